"""What holds for every policy kind."""

import dataclasses
import json
import subprocess
import sys
import types
import typing
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo.data.kinds import KINDS, PolicyKind
from dpo.data.kinds.javascript import MAX_SAFE_INTEGER
from dpo.data.kinds.schema import Range
from dpo.data.simulate import simulated_situations
from dpo.errors import InputError

quick = settings(max_examples=40, deadline=None)
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def values(annotation: Any) -> st.SearchStrategy[Any]:
    """Draw from all that a field's annotation allows."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return st.none() | values(arguments[0])
    if origin is tuple:
        return st.lists(values(arguments[0]), max_size=3).map(tuple)
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is Annotated:
        type_, allowed = arguments
        assert isinstance(allowed, Range)
        if type_ is int:
            return st.integers(int(allowed.low), int(allowed.high or MAX_SAFE_INTEGER))
        return st.floats(allowed.low, allowed.high or 1e12)
    if annotation is bool:
        return st.booleans()
    return st.text() if annotation is str else records(annotation)


def records(record: type[Any]) -> st.SearchStrategy[Any]:
    hints = typing.get_type_hints(record, include_extras=True)
    return st.builds(record, **{name: values(hint) for name, hint in hints.items()})


def states(kind: PolicyKind) -> st.SearchStrategy[Any]:
    return records(typing.get_type_hints(type(kind).render_prompt)["state"])


def actions(kind: PolicyKind) -> st.SearchStrategy[Any]:
    return records(typing.get_type_hints(type(kind).action_class)["action"])


@every_kind
@quick
@given(data=st.data())
def test_a_response_text_parses_back_to_its_action(kind: PolicyKind, data: st.DataObject) -> None:
    action = data.draw(actions(kind))

    assert kind.parse_response(kind.render_action(action)) == action


@every_kind
@quick
@given(data=st.data())
def test_states_and_actions_survive_the_disk(kind: PolicyKind, data: st.DataObject) -> None:
    state, action = data.draw(states(kind)), data.draw(actions(kind))

    state_again = json.loads(json.dumps(kind.state_to_json(state)))
    action_again = json.loads(json.dumps(kind.action_to_json(action)))

    assert kind.parse_state(state_again, "row 1") == state
    assert kind.parse_action(action_again, "row 1") == action


@every_kind
@quick
@given(data=st.data())
def test_the_rules_answer_every_state_with_a_valid_action(
    kind: PolicyKind, data: st.DataObject
) -> None:
    answer = kind.baseline(data.draw(states(kind)))

    assert kind.parse_action(kind.action_to_json(answer.action), "answer") == answer.action
    assert kind.action_class(answer.action) in kind.classes
    assert 0 < answer.confidence < 1
    assert answer.reason


@every_kind
@quick
@given(data=st.data())
def test_prompts_and_group_keys_are_functions_of_the_state(
    kind: PolicyKind, data: st.DataObject
) -> None:
    state = data.draw(states(kind))
    again = kind.parse_state(kind.state_to_json(state), "row 1")

    assert kind.render_prompt(again) == kind.render_prompt(state)
    assert kind.group_key(again) == kind.group_key(state)
    assert hash(kind.group_key(state)) is not None


@every_kind
def test_a_prompt_ends_with_its_question_and_no_line_break(kind: PolicyKind) -> None:
    prompt = kind.render_prompt(simulated_situations(kind.name, 1)[0])

    assert prompt.endswith("?")
    assert "None" not in prompt
    assert "True" not in prompt


@every_kind
def test_the_actions_to_choose_among_are_valid_distinct_and_cover_the_classes(
    kind: PolicyKind,
) -> None:
    choices = kind.actions()

    assert len({kind.render_action(action) for action in choices}) == len(choices)
    assert {kind.action_class(action) for action in choices} == set(kind.classes)
    assert all(kind.parse_action(kind.action_to_json(each), "choice") == each for each in choices)


@every_kind
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "response: malformed JSON: Expecting value"),
        ('{"decision": ', "response: malformed JSON"),
        ("[" * 100_000, "response: malformed JSON: "),
        ('{"action": "keep", "action": "merge"}', "response: malformed JSON: .*action"),
        ("3", "response: the record must be an object, got 3"),
        ('"store"', 'response: the record must be an object, got "store"'),
        ('{"reason": "x"}', "response: .* is missing; reason is not a field, expected only "),
        ('{} {"decision": "skip"}', "response: malformed JSON: Extra data"),
    ],
)
def test_a_response_that_is_no_action_is_refused(kind: PolicyKind, text: str, message: str) -> None:
    with pytest.raises(InputError, match=f"{kind.name} {message}"):
        kind.parse_response(text)


@every_kind
def test_a_reward_is_refused_an_empty_outcome(kind: PolicyKind) -> None:
    for action in kind.actions():
        with pytest.raises(InputError, match=r"outcome of \w.*: .* is missing"):
            kind.reward({}, action)


@every_kind
def test_actions_are_frozen_and_hashable(kind: PolicyKind) -> None:
    action = kind.actions()[0]

    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(action, dataclasses.fields(action)[0].name, None)
    assert action in {action}


def test_kinds_are_listed_under_their_names() -> None:
    assert list(KINDS) == ["extraction", "retrieval", "consolidation"]
    assert all(kind.name == name for name, kind in KINDS.items())


def test_kinds_and_simulator_do_without_torch() -> None:
    code = "import sys, dpo.data.kinds, dpo.data.simulate; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@every_kind
def test_ids_are_what_no_action_to_choose_among_has(kind: PolicyKind) -> None:
    fields = {field.name for field in dataclasses.fields(kind.actions()[0])}
    set_fields = {
        name for name in fields if any(getattr(each, name) is not None for each in kind.actions())
    }
    assert set(kind.id_fields) == fields - set_fields


@every_kind
@quick
@given(data=st.data())
def test_an_action_without_ids_is_the_same_but_for_them(kind: PolicyKind, data: Any) -> None:
    action = data.draw(actions(kind))
    without = kind.without_ids(action)
    assert all(getattr(without, name) is None for name in kind.id_fields)
    ids = {name: getattr(action, name) for name in kind.id_fields}
    assert dataclasses.replace(without, **ids) == action
