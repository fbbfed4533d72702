"""Programs that use the engine as a library, one use each; ``python -m dpo.examples.NAME`` runs it.

They train a tiny model from scratch on a few pairs, in seconds and without a network. To use a
model of your own, put ``load_model("folder")`` and ``load_tokenizer("folder")`` in place of
``make_tiny_model`` and ``byte_tokenizer``, and ``read_pairs("pairs.jsonl")`` in place of the pairs.
The cells (``# %%``) are those of Jupyter, VS Code and Spyder.
"""
