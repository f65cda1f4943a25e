"""Keys and values become token ids that come back exactly, or are refused.

The tokenizer is byte-level, so that it holds any text: ids 0 to 255 are bytes, then "th" and "the", then specials.
"""

import re
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from loramem.embedded import base_path
from loramem.errors import NotRoundTrip, PromptCollision, SpecialTokenInText, TooLong, UnsupportedBaseModel
from loramem.records.prompts import (
    EncodedRecord,
    PromptTemplate,
    decode_answer,
    encode_record,
    encode_records,
    special_texts,
)
from loramem.records.record import Record

CHAT = (
    "{% for m in messages %}<start>{{ m.role }}\n{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant\n{% endif %}"
)
WITH_SYSTEM_AND_DATE = (
    "{% if messages[0].role != 'system' %}<start>system\nToday is {{ strftime_now('%Y-%m-%d %H:%M:%S.%f') }}. "
    "Be brief.<end>\n{% endif %}" + CHAT
)
TRIMMING = CHAT.replace("m.content", "m.content | trim")
CLOSING_WITH_EOS = CHAT.replace("<end>\n", "{% if m.role == 'assistant' %}<eos>{% endif %}\n")
NOTHING_CLOSES = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def make_tokenizer(
    template: str | None = None,
    *,
    normalizer: normalizers.Normalizer | None = None,
    eos: str | None = "<eos>",
    bos: str | None = None,
    named: tuple[str, ...] = ("<start>", "<end>"),
) -> PreTrainedTokenizerFast:
    """A byte-level BPE; ``named`` are the specials that transformers is told of besides bos and eos."""
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {"th": 256, "the": 257}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h"), ("th", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.add_special_tokens(["<eos>", "<bos>", "<start>", "<end>", "<end>2"])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, bos_token=bos, extra_special_tokens=list(named)
    )
    wrapped.chat_template = template
    return wrapped


PLAIN = make_tokenizer()
CHATTY = make_tokenizer(CHAT)


def text(tokenizer: PreTrainedTokenizerFast, ids: tuple[int, ...] | list[int]) -> str:
    return decode_answer(tokenizer, ids)


def encode(*records: Record, tokenizer: PreTrainedTokenizerFast = PLAIN, max_tokens: int = 1000) -> list[EncodedRecord]:
    return encode_records(records, tokenizer, PromptTemplate.of(tokenizer), max_tokens)


# --- the template


def test_a_chat_template_is_split_around_the_key() -> None:
    template = PromptTemplate.of(CHATTY)
    assert template.kind == "chat"
    assert text(CHATTY, template.prefix_ids) == "<start>user\n"
    assert text(CHATTY, template.suffix_ids) == "<end>\n<start>assistant\n"
    assert text(CHATTY, template.prompt_ids(CHATTY, "Who?")) == "<start>user\nWho?<end>\n<start>assistant\n"


def test_marks_of_the_template_become_special_tokens() -> None:
    template = PromptTemplate.of(CHATTY)
    start, end = CHATTY.convert_tokens_to_ids(["<start>", "<end>"])
    assert template.prefix_ids[0] == start
    assert template.suffix_ids[0] == end


def test_without_chat_template_the_prompt_is_the_key_and_a_line_feed() -> None:
    template = PromptTemplate.of(PLAIN)
    assert (template.kind, template.prefix_ids, template.end_id) == ("plain", (), PLAIN.eos_token_id)
    assert text(PLAIN, template.prompt_ids(PLAIN, "Who?")) == "Who?\n"


def test_a_plain_prompt_begins_with_the_bos_token_where_there_is_one() -> None:
    tokenizer = make_tokenizer(bos="<bos>")
    template = PromptTemplate.of(tokenizer)
    assert template.prefix_ids == (tokenizer.bos_token_id,)
    assert text(tokenizer, template.prompt_ids(tokenizer, "Who?")) == "<bos>Who?\n"


def test_a_chat_prompt_holds_the_bos_token_only_where_the_template_writes_it() -> None:
    with_bos = make_tokenizer("{{ bos_token }}" + CHAT, bos="<bos>")
    assert text(with_bos, PromptTemplate.of(with_bos).prefix_ids) == "<bos><start>user\n"
    without = make_tokenizer(CHAT, bos="<bos>")
    assert text(without, PromptTemplate.of(without).prefix_ids) == "<start>user\n"


def test_a_default_system_prompt_and_todays_date_are_frozen_in_the_ids() -> None:
    tokenizer = make_tokenizer(WITH_SYSTEM_AND_DATE)
    template, later = PromptTemplate.of(tokenizer), PromptTemplate.of(tokenizer)
    prefix = text(tokenizer, template.prefix_ids)
    assert re.fullmatch(r"<start>system\nToday is \d{4}-\d\d-\d\d [\d:.]+\. Be brief\.<end>\n<start>user\n", prefix)
    assert later.prefix_ids != template.prefix_ids  # the clock moves on...
    prompt = text(tokenizer, template.prompt_ids(tokenizer, "Who?"))
    assert prompt == prefix + "Who?<end>\n<start>assistant\n"  # ...and a frozen template does not see it


def test_a_template_that_trims_its_input_does_not_trim_keys() -> None:
    tokenizer = make_tokenizer(TRIMMING)
    keys = ["Who?", " Who?", "Who?\n", "Who? "]
    entries = encode(*(Record(key, "x") for key in keys), tokenizer=tokenizer)
    assert len({entry.prompt_ids for entry in entries}) == 4
    for key, entry in zip(keys, entries, strict=True):
        assert text(tokenizer, entry.prompt_ids) == f"<start>user\n{key}<end>\n<start>assistant\n"


def test_an_option_to_think_is_turned_off() -> None:
    tokenizer = make_tokenizer(CHAT + "{% if enable_thinking is not false %}<start>think{% endif %}")
    assert text(tokenizer, PromptTemplate.of(tokenizer).suffix_ids) == "<end>\n<start>assistant\n"


@pytest.mark.parametrize(
    ("template", "times"),
    [
        (CHAT.replace("{{ m.content }}", "{{ m.content }} {{ m.content }}"), 2),
        (CHAT.replace("{{ m.content }}", "a message"), 0),
        (CHAT.replace("m.content", "m.content | lower"), 0),
    ],
)
def test_a_chat_template_must_show_the_users_message_once(template: str, times: int) -> None:
    with pytest.raises(UnsupportedBaseModel, match=f" {times} times"):
        PromptTemplate.of(make_tokenizer(template))


@pytest.mark.parametrize("template", [None, CHAT])
def test_a_tokenizer_without_end_of_sequence_token_is_refused(template: str | None) -> None:
    with pytest.raises(UnsupportedBaseModel, match="eos_token"):
        PromptTemplate.of(make_tokenizer(template, eos=None))


# --- the end of an answer


@pytest.mark.parametrize(
    ("template", "end"),
    [(CHAT, "<end>"), (CLOSING_WITH_EOS, "<eos>"), (NOTHING_CLOSES, "<eos>"), (WITH_SYSTEM_AND_DATE, "<end>")],
    ids=["end of turn", "end of sequence", "no mark", "end of turn after a system prompt"],
)
def test_an_answer_ends_with_what_the_template_puts_behind_the_assistant(template: str, end: str) -> None:
    tokenizer = make_tokenizer(template)
    assert PromptTemplate.of(tokenizer).end_id == tokenizer.convert_tokens_to_ids(end)


def test_an_end_of_turn_is_found_though_only_the_tokenizers_file_marks_it_special() -> None:
    tokenizer = make_tokenizer(CHAT, named=())
    assert PromptTemplate.of(tokenizer).end_id == tokenizer.convert_tokens_to_ids("<end>")


def test_a_template_that_hides_the_assistants_message_ends_answers_with_eos() -> None:
    template = "{% for m in messages %}{% if m.role == 'user' %}<start>{{ m.content }}\n{% endif %}{% endfor %}"
    tokenizer = make_tokenizer(template)
    assert PromptTemplate.of(tokenizer).end_id == tokenizer.eos_token_id


# --- records


def test_a_record_is_prompt_answer_and_end_token() -> None:
    [entry] = encode(Record("the key", "91the"), tokenizer=CHATTY)
    end = CHATTY.convert_tokens_to_ids("<end>")
    assert text(CHATTY, entry.prompt_ids) == "<start>user\nthe key<end>\n<start>assistant\n"
    assert CHATTY.convert_ids_to_tokens(list(entry.answer_ids)) == ["9", "1", "the", "<end>"]
    assert entry.answer_ids[-1] == end == PromptTemplate.of(CHATTY).end_id


def test_the_length_leaves_out_the_end_token_and_the_total_does_not() -> None:
    [entry] = encode(Record("abc", "91006"))
    assert len(entry.answer_ids) == 6
    assert entry.length == 5  # the digits
    assert entry.total_tokens == 3 + 1 + 5 + 1  # key, line feed, digits, end


def test_tokens_that_merge_across_the_borders_of_the_key_do_so_as_in_the_chat() -> None:
    tokenizer = make_tokenizer("t{% for m in messages %}{{ m.content }}e{% endfor %}")
    merged, apart = encode(Record("h", "x"), Record("o", "x"), tokenizer=tokenizer)
    assert tokenizer.convert_ids_to_tokens(list(merged.prompt_ids)) == ["the"]
    assert merged.prompt == {"chat": True, "ids": [257]}
    assert tokenizer.convert_ids_to_tokens(list(apart.prompt_ids)) == ["t", "o", "e"]
    assert apart.prompt == {"chat": True}


def test_no_special_tokens_are_added_around_key_or_value() -> None:
    tokenizer = make_tokenizer(bos="<bos>")
    around = [("<bos>", tokenizer.bos_token_id), ("<eos>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<bos> $A <eos>", None, around)
    assert text(tokenizer, tokenizer("k")["input_ids"]) == "<bos>k<eos>"
    [entry] = encode(Record("k", "v"), tokenizer=tokenizer)
    assert text(tokenizer, [*entry.prompt_ids, *entry.answer_ids]) == "<bos>k\nv<eos>"


@given(value=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12))
def test_any_value_comes_back_from_its_answer_ids(value: str) -> None:
    entry = encode_record(Record("k", value), PLAIN, PromptTemplate.of(PLAIN))
    assert decode_answer(PLAIN, entry.answer_ids[:-1]) == value


@pytest.mark.parametrize("value", ["do n't , it . 's", " a ! ", "x ?", "\n\n", "<eo"])
def test_decoding_cleans_nothing_up(value: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.clean_up_tokenization_spaces = True
    tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    [entry] = encode(Record("k", value), tokenizer=tokenizer)
    assert decode_answer(tokenizer, entry.answer_ids[:-1]) == value


def test_decoding_shows_special_tokens() -> None:
    assert decode_answer(PLAIN, [PLAIN.convert_tokens_to_ids("<start>")]) == "<start>"


# --- refusals


@pytest.mark.parametrize("special", ["<eos>", "<bos>", "<start>", "<end>", "<end>2"])
@pytest.mark.parametrize("field", ["key", "value"])
def test_a_special_token_in_key_or_value_is_refused(field: str, special: str) -> None:
    fields = {"key": "k", "value": "v"} | {field: f"so {special}, then"}
    with pytest.raises(SpecialTokenInText, match=f"^Line 7: The {field} ") as caught:
        encode(Record("fine", "1", line=6), Record(**fields, line=7), tokenizer=CHATTY)
    assert (caught.value.token, caught.value.key, caught.value.line) == (special, fields["key"], 7)


def test_special_texts_come_longest_first_and_without_ordinary_added_tokens() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    assert special_texts(tokenizer) == ["<start>", "<end>2", "<bos>", "<end>", "<eos>"]
    [entry] = encode(Record("<tool>", "a<tool>b"), tokenizer=tokenizer)
    assert entry.length == 3


@pytest.fixture
def lowercasing() -> Iterator[PreTrainedTokenizerFast]:
    yield make_tokenizer(normalizer=normalizers.Lowercase())


def test_a_value_that_the_tokenizer_changes_is_refused(lowercasing: PreTrainedTokenizerFast) -> None:
    with pytest.raises(NotRoundTrip) as caught:
        encode(Record("k", "Abc", line=4), tokenizer=lowercasing)
    error = caught.value
    assert (error.expected, error.got, error.key, error.line) == ("Abc", "abc", "k", 4)


def test_a_key_may_be_changed_by_the_tokenizer(lowercasing: PreTrainedTokenizerFast) -> None:
    [entry] = encode(Record("Abc", "x"), tokenizer=lowercasing)
    assert text(lowercasing, entry.prompt_ids) == "abc\n"
    assert entry.record.key == "Abc"


def test_a_value_whose_ids_hold_the_end_token_is_refused() -> None:
    with pytest.raises(NotRoundTrip):
        encode_record(Record("k", "before<eos>after"), PLAIN, PromptTemplate.of(PLAIN))


@pytest.mark.parametrize("value", ["x", "y"])
def test_two_keys_with_the_same_prompt_ids_collide(lowercasing: PreTrainedTokenizerFast, value: str) -> None:
    records = [Record("Alpha", "x", line=1), Record("beta", "x", line=2), Record("alpha", value, line=3)]
    with pytest.raises(PromptCollision) as caught:
        encode(*records, tokenizer=lowercasing)
    assert (caught.value.other, caught.value.key, caught.value.line) == ("Alpha", "alpha", 3)


def test_a_key_does_not_collide_with_itself() -> None:
    assert len(encode(Record("alpha", "x"), Record("alpha", "y"))) == 2


def test_keys_collide_within_a_namespace_only(lowercasing: PreTrainedTokenizerFast) -> None:
    same = [Record("alpha", "x", "home"), Record("alpha", "y", "work")]
    alike = [Record("Alpha", "x", "home"), Record("alpha", "y", "work")]
    for records in (same, alike):
        first, second = encode(*records, tokenizer=lowercasing)
        assert first.prompt_ids == second.prompt_ids


def test_a_record_as_long_as_the_context_fits_and_one_token_more_does_not() -> None:
    record = Record("abc", "91006", line=2)  # 3 + 1 + 5 + 1 = 10 tokens
    assert len(encode(record, max_tokens=10)) == 1
    with pytest.raises(TooLong, match=r"^Line 2: .*prompt 4, answer 5, end 1") as caught:
        encode(record, max_tokens=9)
    error = caught.value
    assert (error.tokens, error.limit, error.key, error.line) == (10, 9, "abc", 2)


# --- the base model that ships with the package


@pytest.mark.skipif(not (base_path() / "tokenizer.json").exists(), reason="the embedded base model is not built")
def test_the_embedded_tokenizer_gives_any_text_back() -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_path())
    values = ["9100672710", " é\u2028😀\t", "do n't , it . 's\n", "#include <vector>", "\x00\x7f"]
    entries = encode(*(Record(f"k{i}", value) for i, value in enumerate(values)), tokenizer=tokenizer)
    assert [decode_answer(tokenizer, entry.answer_ids[:-1]) for entry in entries] == values
    assert entries[0].length == 10  # a token per digit
    assert entries[0].answer_ids[-1] in tokenizer.all_special_ids
