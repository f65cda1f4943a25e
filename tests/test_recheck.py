"""Certificates looked at again, in the store's dtype and in those of servers."""

import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from loramem import MemoryStore
from loramem.errors import IntegrityError
from loramem.index.rows import digest_of
from loramem.models.decoding import answer_probabilities
from loramem.records.prompts import encode_record
from loramem.records.record import Record
from loramem.store.certificates import check_certificates

from .conftest import numbers
from .test_integrity import execute, flip_bit, reseal

RECORDS = numbers(6)


@pytest.fixture(scope="module")
def written(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters of three records each, without values."""
    path = tmp_path_factory.mktemp("written") / "memory"
    with MemoryStore(path, str(base), keep_values=False) as store:
        store.write(dict(list(RECORDS.items())[:3]))
        store.write(dict(list(RECORDS.items())[3:]))
    return path


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    shutil.copytree(written, tmp_path / "memory")
    return tmp_path / "memory"


def test_in_the_stores_own_dtype_the_certificates_come_out_again(written: Path) -> None:
    told = []
    with MemoryStore(written, create=False) as store:
        checks = check_certificates(store._session, progress=lambda done, total: told.append((done, total)))
        proofs = [adapter.proof for adapter in store.adapters()]
        assert [check.adapter for check in checks] == [adapter.id for adapter in store.adapters()]
    for check, proof in zip(checks, proofs, strict=True):
        assert check.ok and (check.exact, check.records, check.unscored) == (3, 3, 0)
        assert check.min_prob == pytest.approx(check.committed_min_prob, abs=1e-5)
        assert check.margin == check.min_prob - 0.5
        assert (check.dtypes, check.device, check.batches) == (
            proof["dtypes"],
            proof["device"],
            {**proof["decoded_batches"], "alone": [1]},
        )
    assert told == [(3, 6), (6, 6)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_a_servers_dtype_base_and_adapter_are_cast_and_the_store_is_not(written: Path, dtype: str) -> None:
    with MemoryStore(written, create=False) as store:
        assert store.recall("key 0") == RECORDS["key 0"]
        adapter = store.adapters()[0]
        served = store._session.served_in(dtype)
        served.reader.activate(adapter)
        assert {tensor.dtype for tensor in served.adapted.weights(adapter.id).values()} == {getattr(torch, dtype)}
        assert served.adapted.model.dtype == getattr(torch, dtype)

        (check,) = check_certificates(store._session, [adapter.id], dtype)
        assert check.dtypes == {"base": dtype, "adapter": dtype}
        assert check.exact == 3
        assert check.min_prob != check.committed_min_prob
        assert check.min_prob == pytest.approx(check.committed_min_prob, abs=0.1)

        assert {tensor.dtype for tensor in store._session.adapted.weights(adapter.id).values()} == {torch.float32}
        assert store.recall("key 0") == RECORDS["key 0"]


def test_the_scores_are_those_of_the_cast_model(base: Path, written: Path) -> None:
    with MemoryStore(written, create=False) as store:
        (check,) = check_certificates(store._session, [store.adapters()[0].id], "bfloat16")
        records, template = list(store.records(adapter=check.adapter)), store.manifest.template()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    adapted = PeftModel.from_pretrained(model, written / "adapters" / check.adapter)
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.bfloat16()
    tokenizer = AutoTokenizer.from_pretrained(base)
    encoded = [encode_record(Record(row.key, RECORDS[row.key]), tokenizer, template) for row in records]
    lowest = min(float(probs.min()) for _, probs in answer_probabilities(model, encoded))
    assert check.min_prob == pytest.approx(lowest, abs=1e-6)


def test_a_record_that_does_not_come_back_is_listed_and_not_scored_without_its_value(copy: Path) -> None:
    execute(copy, "update records set salt = 'other' where key = 'key 1'")
    reseal(copy)
    with MemoryStore(copy, create=False) as store:
        first, second = check_certificates(store._session)
    assert (first.failed, first.exact, first.unscored, first.ok) == (("key 1",), 2, 1, False)
    assert first.min_prob > 0.6
    assert second.ok


def test_a_record_that_does_not_come_back_is_scored_where_its_value_is_kept(copy: Path) -> None:
    digest = digest_of("salt", "", "key 1", "0000")
    execute(copy, f"update records set salt = 'salt', digest = '{digest}', value = '0000' where key = 'key 1'")
    reseal(copy)
    with MemoryStore(copy, create=False) as store:
        first, _ = check_certificates(store._session)
    assert (first.failed, first.unscored) == (("key 1",), 0)
    assert first.min_prob < 0.5 and first.margin < 0


def test_what_is_checked_is_the_file_not_what_was_read_of_it_before(copy: Path) -> None:
    with MemoryStore(copy, create=False) as store:
        assert store.recall("key 0") == RECORDS["key 0"]
        adapter = store.adapters()[0].id
        flip_bit(copy / "adapters" / adapter / "adapter_model.safetensors", 12_000)
        with pytest.raises(IntegrityError, match=adapter):
            check_certificates(store._session)


def test_an_adapter_that_the_store_does_not_have_is_refused(written: Path) -> None:
    with MemoryStore(written, create=False) as store, pytest.raises(IntegrityError, match="no adapter"):
        check_certificates(store._session, ["0" * 32])
