"""What a run reads, and what it says about it."""

import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo.config import LossConfig, RunConfig
from dpo.errors import InputError
from dpo.inputs import (
    Inputs,
    cache_folder,
    find_models,
    hold_out,
    load_all_pairs,
    load_inputs,
    pin_revisions,
)
from dpo.mixing import MixConfig, seeded_digest
from dpo.pair_rows import RankedPairs
from dpo.preferences import PreferencePair
from dpo.progress import Console
from dpo.tokenize_config import TokenizeOptions
from dpo.train_config import TrainConfig

MakeFolder = Callable[..., Path]
ROWS: list[dict[str, object]] = [
    {"prompt": f"say {n}", "chosen": " yes", "rejected": " no"} for n in range(12)
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_rows(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def config(tmp_path: Path, model_folder: Path) -> RunConfig:
    data = write_rows(tmp_path / "pairs.jsonl", ROWS)
    return RunConfig(model=str(model_folder), data=data, out=str(tmp_path / "RUN"))


def loaded(config: RunConfig, *, quiet: bool = False) -> tuple[Inputs, str]:
    said = io.StringIO()
    inputs = load_inputs(config, find_models(config), Console(said, quiet=quiet))
    return inputs, said.getvalue()


# --- splitting ----------------------------------------------------------------------------------


def pairs_of(prompts: list[int]) -> list[PreferencePair]:
    return [
        PreferencePair(f"prompt {prompt}", "yes", "no", id=f"{row}")
        for row, prompt in enumerate(prompts)
    ]


def split_pairs(
    pairs: list[PreferencePair], share: float, *, seed: int
) -> tuple[list[PreferencePair], list[PreferencePair]]:
    prompts = np.array([seeded_digest(pair.prompt, seed) for pair in pairs]).view("V16")
    marked = list(zip(pairs, hold_out(prompts, share), strict=True))
    return [pair for pair, held in marked if not held], [pair for pair, held in marked if held]


@given(
    prompts=st.lists(st.integers(0, 9), min_size=4, max_size=40).filter(lambda p: len({*p}) > 3),
    share=st.floats(0.3, 0.7),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_split_keeps_prompts_together_and_does_not_depend_on_the_order_of_rows(
    prompts: list[int], share: float, seed: int, data: st.DataObject
) -> None:
    pairs = pairs_of(prompts)
    try:
        kept, held_out = split_pairs(pairs, share, seed=seed)
    except InputError:
        return  # some prompt has too many of the pairs
    assert {pair.prompt for pair in kept} & {pair.prompt for pair in held_out} == set()
    assert [p for p in pairs if p in kept] == kept
    assert [p for p in pairs if p in held_out] == held_out
    assert len(kept) + len(held_out) == len(pairs)

    shuffled = data.draw(st.permutations(pairs))
    ids = sorted(str(pair.id) for pair in split_pairs(shuffled, share, seed=seed)[1])
    assert ids == sorted(str(pair.id) for pair in held_out)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.9])
def test_split_holds_out_the_share_asked_for(share: float) -> None:
    pairs = pairs_of(list(range(200)))
    assert len(split_pairs(pairs, share, seed=0)[1]) == round(200 * share)


def test_split_depends_on_the_seed() -> None:
    pairs = pairs_of(list(range(50)))
    assert split_pairs(pairs, 0.5, seed=0) != split_pairs(pairs, 0.5, seed=1)


@pytest.mark.parametrize(
    ("prompts", "share", "message"),
    [
        ([1, 2, 3], 0.1, "eval_split 0.1 of 3 pairs with 3 prompts leaves 3 to train on and 0"),
        ([1, 2, 3], 0.9, "eval_split 0.9 of 3 pairs with 3 prompts leaves 0 to train on and 3"),
        ([1, 1, 1], 0.5, "eval_split 0.5 of 3 pairs with 1 prompts leaves"),
    ],
)
def test_split_with_an_empty_part_is_refused(
    prompts: list[int], share: float, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        split_pairs(pairs_of(prompts), share, seed=0)


# --- reading ------------------------------------------------------------------------------------


def test_held_out_pairs_come_from_a_split_or_a_file_of_their_own(
    tmp_path: Path, config: RunConfig
) -> None:
    apart = write_rows(tmp_path / "apart.jsonl", ROWS[:5])
    alone, _ = loaded(config)
    split, said = loaded(replace(config, eval_split=0.25))
    beside, _ = loaded(replace(config, eval_data=apart))
    assert (len(alone.pairs), alone.eval_pairs) == (12, None)
    assert split.eval_pairs is not None
    assert beside.eval_pairs is not None
    assert (len(split.pairs), len(split.eval_pairs)) == (9, 3)
    assert (len(beside.pairs), len(beside.eval_pairs)) == (12, 5)
    assert "3 pairs held out, none shares its prompt with the others" in said


def test_all_pairs_are_read_though_the_config_holds_some_out(config: RunConfig) -> None:
    config = replace(config, eval_split=0.5)
    inputs = load_all_pairs(config, find_models(config), Console(io.StringIO()))
    assert (len(inputs.pairs), inputs.eval_pairs) == (12, None)


@pytest.fixture
def mixture(tmp_path: Path, config: RunConfig) -> RunConfig:
    """Twelve rows and four others, the same number of each."""
    other = write_rows(tmp_path / "other.jsonl", [{**ROWS[0], "prompt": f"{n}?"} for n in range(4)])
    data = (str(config.data), other)
    return replace(config, data=data, mix=MixConfig(temperature=math.inf))


def test_several_data_sets_are_mixed(mixture: RunConfig) -> None:
    inputs, said = loaded(mixture)
    assert "pairs: 8 of 12 rows\nother: 8 rows, 2.0 times its 4\n" in said
    assert sorted(set(inputs.pairs.sources), key=str) == ["other", "pairs"]
    assert {"other/row-1", "other/row-1#2"} < set(inputs.pairs.ids)
    assert len(inputs.pairs) == 16
    assert loaded(mixture)[0].pairs.fingerprint == inputs.pairs.fingerprint
    reseeded = replace(mixture, train=TrainConfig(seed=1))
    assert loaded(reseeded)[0].pairs.fingerprint != inputs.pairs.fingerprint


def test_mixture_goes_through_one_set_after_the_other_time_after_time(mixture: RunConfig) -> None:
    ids = list(loaded(replace(mixture, mix=MixConfig(weights=(1, 2), rows=9)))[0].pairs.ids)
    numbers = [int(name.removeprefix("pairs/row-")) for name in ids[:3]]
    assert numbers == sorted({*numbers})
    assert ids[3:7] == [f"other/row-{row}" for row in (1, 2, 3, 4)]
    assert [name[-2:] for name in ids[7:]] == ["#2", "#2"]
    assert ids[7:] == sorted({*ids[7:]})


def test_mixture_is_of_the_rows_that_are_not_held_out(mixture: RunConfig) -> None:
    inputs, said = loaded(replace(mixture, eval_split=0.25))
    assert inputs.eval_pairs is not None
    assert len(inputs.eval_pairs) == 4
    assert not any("#" in name for name in inputs.eval_pairs.ids)
    kept = {name.split("#")[0] for name in inputs.pairs.ids}
    assert kept.isdisjoint(inputs.eval_pairs.ids)
    assert len(inputs.pairs) == 12
    assert "pairs: 6 of" in said


def test_all_pairs_of_several_data_sets_are_read_once(mixture: RunConfig) -> None:
    inputs = load_all_pairs(mixture, find_models(mixture), Console(io.StringIO()))
    assert len(inputs.pairs) == 16
    assert not any("#" in name for name in inputs.pairs.ids)


def test_choice_of_ranked_answers_needs_a_set_of_them(tmp_path: Path, mixture: RunConfig) -> None:
    with pytest.raises(InputError, match=r"ranked has no effect: .*pairs\.jsonl holds prompt and"):
        loaded(replace(mixture, ranked="best"))
    ranked: dict[str, object] = {"prompt": "a", "answers": ["b", "c", "d"], "scores": [1, 2, 3]}
    data = (write_rows(tmp_path / "ranked.jsonl", [ranked]), str(mixture.sources[0]))
    inputs, _ = loaded(replace(mixture, data=data, ranked="best", mix=MixConfig()))
    assert len(inputs.pairs) == 14


def test_one_data_set_is_not_named(config: RunConfig) -> None:
    assert loaded(config)[0].pairs.ids[0] == "row-1"
    assert loaded(config)[0].pairs.sources[0] is None


def test_tokens_are_found_in_the_cache_the_second_time(config: RunConfig) -> None:
    (_, first), (_, second) = loaded(config), loaded(config)
    assert "12 of 12 rows; cache stored" in first
    assert "12 of 12 rows; cache found" in second
    assert "tokenize 100% 12/12" in second


def test_columns_that_mean_nothing_are_named(tmp_path: Path, config: RunConfig) -> None:
    data = write_rows(tmp_path / "more.jsonl", [{**row, "score": 1, "note": ""} for row in ROWS])
    _, said = loaded(replace(config, data=data))
    assert f"{data}: columns that are not read: score, note" in said


def test_unpaired_answers_are_counted_by_label(tmp_path: Path, config: RunConfig) -> None:
    rows: list[dict[str, object]] = [
        {"prompt": f"say {n}", "completion": " yes", "label": n > 0} for n in range(3)
    ]
    data = write_rows(tmp_path / "unpaired.jsonl", rows)
    inputs, said = loaded(replace(config, data=data, eval_split=0.34))
    assert f"{data}: 3 answers, 2 chosen and 1 rejected, unpaired, prompt and answers as" in said
    assert inputs.pairs.is_unpaired.all()


def test_ranked_answers_become_pairs_and_a_choice_without_them_is_refused(
    tmp_path: Path, config: RunConfig
) -> None:
    ranked: list[dict[str, object]] = [
        {"prompt": f"a{n}", "answers": ["b", "c", "d"], "scores": [1, 2, 3]} for n in (1, 2)
    ]
    choices: list[tuple[RankedPairs | None, int]] = [(None, 6), ("all", 6), ("best", 4)]
    data = write_rows(tmp_path / "ranked.jsonl", ranked)
    for choice, pairs in choices:
        _, said = loaded(replace(config, data=data, ranked=choice))
        assert f"{data}: {pairs} pairs, ranked answers" in said
    with pytest.raises(InputError, match=r"ranked has no effect: .* holds prompt and answers as"):
        loaded(replace(config, ranked="best"))
    listwise = replace(config, data=data, loss=LossConfig("plackett_luce"))
    inputs, said = loaded(listwise)
    assert f"{data}: 4 pairs, ranked answers" in said
    assert inputs.pairs.chains.tolist() == [0, 0, 1, 1]
    with pytest.raises(InputError, match="ranked = all makes pairs of which plackett_luce sees no"):
        loaded(replace(listwise, ranked="all"))


def test_rows_left_out_are_told_even_when_quiet(tmp_path: Path, config: RunConfig) -> None:
    long: dict[str, object] = {**ROWS[0], "id": "long", "chosen": " yes" * 9}
    data = write_rows(tmp_path / "faulty.jsonl", [*ROWS, {"prompt": "a"}, long])
    options = TokenizeOptions(max_length=30)
    config = replace(config, data=data, on_bad_row="skip", tokenize=options)
    _, said = loaded(config, quiet=True)
    assert said.splitlines() == [
        f"{data}: 1 faulty rows left out",
        f"  {data}:13: missing chosen and rejected; the row has prompt",
        "1 rows dropped: long (42 tokens, max_length 30)",
    ]


def test_quiet_console_says_nothing_of_sound_rows(config: RunConfig) -> None:
    assert loaded(config, quiet=True)[1] == ""


def test_rows_longer_than_the_model_was_made_for_are_warned_of(
    tmp_path: Path, config: RunConfig, make_model_folder: MakeFolder
) -> None:
    model = make_model_folder(tmp_path / "short", max_position_embeddings=9)
    _, said = loaded(replace(config, model=str(model)))
    assert "the longest row has 11 tokens, the model was made for 9; --max-length 9 refuses" in said
    _, said = loaded(replace(config, reference=str(model)))
    assert "the longest row has 11 tokens, the model was made for 9" in said


# --- models -------------------------------------------------------------------------------------


def test_policy_is_its_own_reference_unless_another_is_named(
    tmp_path: Path, config: RunConfig, make_model_folder: MakeFolder
) -> None:
    own = find_models(config)
    assert own.reference is own.policy
    other = find_models(replace(config, reference=str(make_model_folder(tmp_path / "o", seed=1))))
    assert other.reference.fingerprint != other.policy.fingerprint == own.policy.fingerprint


def test_faulty_reference_is_refused_before_data_is_read(
    tmp_path: Path, config: RunConfig, make_model_folder: MakeFolder
) -> None:
    reference = make_model_folder(tmp_path / "reference")
    (reference / "model.safetensors").unlink()
    with pytest.raises(InputError, match=f"{reference}: no weights"):
        find_models(replace(config, reference=str(reference), data="absent.jsonl"))


COMMIT = "c" * 40


def on_the_hub(home: Path, kind: str, name: str) -> Path:
    """Lay a repository out as the cache of huggingface-hub holds it; return its folder of files."""
    repository = home / f"{kind}s--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "snapshots" / COMMIT).mkdir(parents=True)
    return repository / "snapshots" / COMMIT


def test_commits_of_what_the_hub_gave_are_pinned(
    tmp_path: Path,
    config: RunConfig,
    make_model_folder: MakeFolder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    make_model_folder(on_the_hub(tmp_path, "model", "me/tiny"))
    write_rows(on_the_hub(tmp_path, "dataset", "me/pairs") / "train.jsonl", ROWS)

    remote = replace(config, model="me/tiny", reference=config.model, eval_data="me/pairs")
    models = find_models(remote)
    pinned = pin_revisions(remote, models, load_inputs(remote, models, Console(quiet=True)))

    assert (pinned.revision, pinned.eval_data_revision) == (COMMIT, COMMIT)
    assert (pinned.reference_revision, pinned.data_revision) == (None, None)
    assert find_models(pinned).policy.path == models.policy.path
    again = pin_revisions(pinned, models, load_inputs(pinned, models, Console(quiet=True)))
    assert again == pinned


def test_folder_within_the_hubs_cache_is_a_local_one(
    tmp_path: Path, config: RunConfig, make_model_folder: MakeFolder
) -> None:
    folder = make_model_folder(on_the_hub(tmp_path, "model", "me/tiny"))
    data = write_rows(folder / "pairs.jsonl", ROWS)
    local = replace(config, model=str(folder), data=data)
    models = find_models(local)
    inputs = load_inputs(local, models, Console(quiet=True))
    assert pin_revisions(local, models, inputs) == local


def test_caches_lie_where_the_user_keeps_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cache_folder("tokens") == tmp_path / "cache" / "dpo-engine" / "tokens"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder("tokens") == tmp_path / ".cache" / "dpo-engine" / "tokens"
