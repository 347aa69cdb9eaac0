"""Random conversations against the released templates, with the released vocabulary.

The oracle knows nothing of how we render. A label is right if it is what the model has to say
after the prompt that inference gives it, token by token: the template's prompt for the turns
before, under the row's own mode, and then the answer as the template writes it.
"""

from __future__ import annotations

import functools
import random
import re
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from qwen3_sft.chat.control_tokens import QWEN3_CONTROL_TOKENS
from qwen3_sft.chat.encoding import Encoder
from qwen3_sft.chat.render import CHAT_FORMATS, detect_chat_format, render
from qwen3_sft.chat.samples import Message, ToolCall
from tests.support.random_conversations import (
    MASK,
    WRAPPED,
    as_rows_have_it,
    conversations,
    unmasked,
)
from tests.support.real_tokenizer import RELEASED, compiled, real_tokenizer, released_template

_CONTROL = re.compile("(" + "|".join(map(re.escape, QWEN3_CONTROL_TOKENS)) + ")")
_QUESTION = Message("user", "q")
MANY = settings(
    derandomize=True, database=None, deadline=None, max_examples=400,
    suppress_health_check=[HealthCheck.too_slow], phases=[Phase.generate, Phase.shrink],
)  # fmt: skip
SEED = random.SystemRandom().randrange(1 << 32)
COUNTED = Counter()


@functools.cache
def encoder():
    return Encoder(real_tokenizer())


@functools.lru_cache(50_000)
def ids_of(text):
    """Return the released tokenizer's ids of a template's text, in which users wrote the masks."""
    backend = real_tokenizer().backend_tokenizer
    if MASK not in text:
        return backend.encode(text, add_special_tokens=False).ids
    ids = []
    for index, part in enumerate(_CONTROL.split(text)):
        ids += [backend.token_to_id(part)] if index % 2 else plain_ids(unmasked(part))
    return ids


@functools.lru_cache(50_000)
def plain_ids(text):
    """Return the ids of text that has no control tokens, whatever it spells."""
    backend = real_tokenizer().backend_tokenizer
    words = backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text))
    return [token.id for word, _ in words for token in backend.model.tokenize(word)]


class Released:
    """A released template and what it says of a conversation."""

    def __init__(self, name):
        self.name = RELEASED[name]
        self.fmt = CHAT_FORMATS[self.name]
        self._template = compiled(released_template(name))

    def text(self, messages, tools=(), **options):
        turns = [as_rows_have_it(message) for message in messages]
        rendered = self._template.render(messages=turns, tools=list(tools) or None, **options)
        for tag in ("<tool_response>{}", "{}</tool_response>"):
            of_user = tag.format(WRAPPED)
            rendered = rendered.replace(of_user, of_user.replace("<", MASK))
        return rendered

    def prompt_and_answer(self, conversation, index):
        """Return the ids of the prompt for a turn and of what the model has to say then.

        What that is does not depend on the turns before, but for the prompt; the template writes it
        after a question, not after nothing.
        """
        message = conversation.messages[index]
        mode = conversation.enable_thinking
        if mode is None:
            mode = message.reasoning is not None
        asked = {"add_generation_prompt": True, "enable_thinking": mode}
        prompt = self.text(conversation.messages[:index], conversation.tools, **asked)
        alone = self.text([_QUESTION, message])
        start = self.text([_QUESTION], **asked)
        assert alone.startswith(start)
        return ids_of(prompt), ids_of(alone.removeprefix(start).removesuffix("\n"))

    def check(self, conversation, samples):
        """Compare all samples of a conversation, and that there is none too many."""
        expected = [
            self.prompt_and_answer(conversation, i)
            for i, message in enumerate(conversation.messages)
            if message.role == "assistant" and i >= conversation.first_trained
        ]
        got, last = [], []
        for ids, edges in samples:
            got += [(ids[:start], ids[start:end]) for start, end in edges]
            assert ids[edges[-1][1] :] == ids_of("\n")
            last.append(len(got) - 1)
        assert got == expected
        for index in last[:-1]:
            prompt, answer = expected[index]
            is_needed = expected[index + 1][0][: len(prompt + answer)] != prompt + answer
            assert is_needed or self._is_near_a_merge(conversation)
        COUNTED[self.name] += 1

    def _is_near_a_merge(self, conversation):
        """Whether an answer begins with blanks, which may merge with those of a prompt."""
        texts = [(m.content, m.reasoning or "") for m in conversation.messages]
        return any(text[:1].isspace() for pair in texts for text in pair)


TEMPLATES = {name: Released(name) for name in RELEASED}


def samples_of(conversation, name):
    """Return (ids, [start, end] of each labelled stretch) of each sample that we train."""
    samples = render(
        conversation, name, train_on="assistant", thinking="split_turns",
        train_empty_think=False, location="f:1", warnings=Counter(),
    )  # fmt: skip
    for ids, trained in encoder().encode_batch(samples):
        edges = np.flatnonzero(np.diff(trained, prepend=False, append=False))
        yield ids.tolist(), edges.reshape(-1, 2).tolist()


def check_all(conversation):
    thinks = any(message.reasoning for message in conversation.messages)
    plain = unmasked(conversation)
    families = {name for name, fmt in CHAT_FORMATS.items() if fmt.thinks or not thinks}
    samples = {name: list(samples_of(plain, name)) for name in families}
    for released in TEMPLATES.values():
        if released.name in families:
            released.check(conversation, samples[released.name])


@pytest.mark.parametrize("name", RELEASED)
def test_released_templates_are_recognised(name):
    assert detect_chat_format(released_template(name)) == RELEASED[name]


@pytest.mark.parametrize("name", RELEASED)
def test_the_oracle_renders_as_transformers_does(name):
    call = {"name": "f", "arguments": {"é": ["<b>", None, 1.5], "x": "ü"}}
    messages = [
        Message("system", "s"), _QUESTION, Message("assistant", "hm", None, (ToolCall(**call),)),
        Message("tool", "9"), Message("assistant", "a", "b"), _QUESTION,
    ]  # fmt: skip
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"é": "<"}}}]
    options = {"add_generation_prompt": True, "enable_thinking": False}
    theirs = real_tokenizer().apply_chat_template(
        [as_rows_have_it(message) for message in messages], tools=tools, tokenize=False,
        chat_template=released_template(name), **options,
    )  # fmt: skip
    assert TEMPLATES[name].text(messages, tools, **options) == theirs


@MANY
@given(conversations())
def _many(conversation):
    check_all(conversation)


def test_random_conversations():
    COUNTED.clear()
    _many()
    assert COUNTED.total() > 2000  # of seven templates


@pytest.mark.long
def test_many_more_random_conversations():
    sys.stdout.write(f"seed {SEED}\n")  # which pytest shows of a test that fails

    @seed(SEED)
    @settings(MANY, derandomize=False, max_examples=10_000)
    @given(conversations())
    def many_more(conversation):
        check_all(conversation)

    many_more()
