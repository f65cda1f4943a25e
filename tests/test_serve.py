"""Stores prove what they write in the dtypes that servers cast to; older stores go on as they were."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from loramem import MemoryStore
from loramem.errors import RecallError, StubbornRecords
from loramem.models.adapters import AdaptedModel
from loramem.models.certificate import Proof, prove
from loramem.models.ending import Ending
from loramem.models.features import Features
from loramem.models.placement import Placement
from loramem.records.prompts import EncodedRecord
from loramem.store.manifest import SERVE, Manifest
from loramem.training import shards
from loramem.training.settings import WriterSettings
from loramem.training.shard_training import ShardTraining

from .conftest import ROOT, numbers

RECORDS = numbers(4)
CERTIFIED = WriterSettings.certify_threshold


def test_a_store_written_by_default_is_proved_in_bfloat16_too(base: Path, tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "m", str(base)) as store:
        store.write(RECORDS)
        assert store.manifest.serve == SERVE == ("bfloat16",)
        (adapter,) = store.adapters()
        own, served = adapter.proof, adapter.proof["served"]
        assert set(served) == {"bfloat16"}
        assert own["dtypes"] == {"base": "float32", "adapter": "float32"}
        assert served["bfloat16"]["dtypes"] == {"base": "bfloat16", "adapter": "bfloat16"}
        assert min(own["min_prob"], served["bfloat16"]["min_prob"]) >= CERTIFIED
        assert own["parameters"] != served["bfloat16"]["parameters"]  # of the weights as they are loaded there
    with MemoryStore(tmp_path / "m", create=False) as store:
        (looked_at,) = store.check(["peft"], dtype="bfloat16").certificates
        assert looked_at.ok
        assert (looked_at.exact, looked_at.failed) == (len(RECORDS), ())
        assert looked_at.dtypes == {"base": "bfloat16", "adapter": "bfloat16"}
        assert looked_at.min_prob == pytest.approx(served["bfloat16"]["min_prob"], abs=1e-3)


Watched = list[tuple[str, float]]


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[str, float], bool]], Watched]:
    """Proofs fail where asked to; the dtype of each and the caution with which its adapter was trained."""

    def watch(fails: Callable[[str, float], bool]) -> Watched:
        proved, cautions = Watched(), list[float]()

        def train(*arguments: Any, **named: Any) -> ShardTraining:
            cautions.append(named["caution"])
            return train_shard(*arguments, **named)

        def proving(
            model: PreTrainedModel,
            records: Sequence[EncodedRecord],
            adapter: str,
            dtypes: dict[str, str],
            ending: Ending | None,
        ) -> Proof:
            proved.append((dtypes["base"], cautions[-1]))
            if fails(*proved[-1]):
                raise RecallError(f"not in {dtypes['base']}", key="k", adapter=adapter)
            return prove(model, records, adapter, dtypes, ending)

        train_shard = shards.train_shard
        monkeypatch.setattr(shards, "train_shard", train)
        monkeypatch.setattr(shards, "prove", proving)
        return proved

    return watch


def test_an_adapter_that_fails_in_bfloat16_alone_is_trained_again_with_more_caution(
    base: Path, tmp_path: Path, watched: Callable[[Callable[[str, float], bool]], Watched]
) -> None:
    proved = watched(lambda dtype, caution: dtype == "bfloat16" and caution == shards.CAUTION[0])
    with MemoryStore(tmp_path / "m", str(base)) as store:
        store.write(RECORDS)
        first, second, *_ = shards.CAUTION
        assert second > first
        assert proved == [("bfloat16", first), ("bfloat16", second), ("float32", second)]
        (adapter,) = store.adapters()  # the refused one is not there
        assert {path.name for path in (tmp_path / "m" / "adapters").iterdir()} == {adapter.id}
        assert {key: store.recall(key) for key in RECORDS} == RECORDS
        assert store.check(["peft"], dtype="bfloat16").ok


def test_what_fails_with_all_caution_is_refused_and_nothing_committed(
    base: Path, tmp_path: Path, watched: Callable[[Callable[[str, float], bool]], Watched]
) -> None:
    proved = watched(lambda dtype, _: dtype == "bfloat16")
    with MemoryStore(tmp_path / "m", str(base)) as store:
        with pytest.raises(RecallError, match="not in bfloat16"):
            store.write(RECORDS)
        assert [caution for dtype, caution in proved if dtype == "bfloat16"] == list(shards.CAUTION)
        assert store.adapters() == []
        assert list(store.keys()) == []
    with MemoryStore(tmp_path / "m", create=False) as store:  # and what was tried is not in the way
        assert store.pending() is None


@pytest.mark.parametrize("decoded", [True, False])
def test_a_record_that_is_refused_among_others_whatever_is_tried_gets_an_adapter_of_its_own(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, decoded: bool
) -> None:
    caplog.set_level("INFO")
    odd, tried, train = list(RECORDS)[1], dict[int, list[float]](), shards.train_shard

    def training(adapted: AdaptedModel, name: str, records: Sequence[EncodedRecord], *rest: Any, **options: Any) -> Any:
        tried.setdefault(len(records), []).append(options["caution"])
        return train(adapted, name, records, *rest, **options)

    def proving(
        model: PreTrainedModel,
        records: Sequence[EncodedRecord],
        adapter: str,
        dtypes: dict[str, str],
        ending: Ending | None,
    ) -> Proof:
        proof = prove(model, records, adapter, dtypes, ending)
        keys = [record.record.key for record in records]
        if odd not in keys or len(keys) == 1:
            return proof
        if not decoded:
            raise RecallError(f"{odd!r} not among others", key=odd, adapter=adapter)
        return Proof(tuple(0.59 if key == odd else 0.9 for key in keys), proof.conditions)

    monkeypatch.setattr(shards, "prove", proving)
    monkeypatch.setattr(shards, "train_shard", training)
    with MemoryStore(tmp_path / "m", str(base)) as store:
        assert store.write(RECORDS).written == len(RECORDS)
        first, *_, last = shards.CAUTION
        assert tried == {len(RECORDS): list(shards.CAUTION), len(RECORDS) - 1: [last], 1: [first]}
        held = [{record.key for record in store.records(adapter=adapter.id)} for adapter in store.adapters()]
        assert sorted(held, key=len) == [{odd}, RECORDS.keys() - {odd}]
        assert "refuses" in caplog.text and odd not in caplog.text
        assert {key: store.recall(key) for key in RECORDS} == RECORDS


def test_the_last_try_is_trained_over_what_the_doubtful_records_compute_alone(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _, third, _ = order = list(RECORDS)
    decoded = list[list[list[int]]]()

    def proving(model: PreTrainedModel, records: Sequence[EncodedRecord], adapter: str, *arguments: Any) -> Proof:
        if len(decoded) < 2:
            raise RecallError("not yet", key=third, adapter=adapter, doubtful=[] if decoded else [first])
        return prove(model, records, adapter, *arguments)

    def collecting(
        models: object, records: Sequence[EncodedRecord], features: Sequence[Features], batches: list[list[int]]
    ) -> list[Features]:
        if models:  # there are none that round inputs as well
            decoded.append(batches)
        return as_decoded(models, records, features, batches)  # type: ignore[arg-type]

    as_decoded = shards.as_decoded
    monkeypatch.setattr(shards, "prove", proving)
    monkeypatch.setattr(shards, "as_decoded", collecting)
    with MemoryStore(tmp_path / "m", str(base)) as store:
        store.write(RECORDS)
    (together,), alone = decoded
    assert sorted(together) == [0, 1, 2, 3]
    assert [order[index] for (index,) in alone] == [first, third]


def test_a_record_that_is_refused_on_its_own_too_is_given_up_and_the_others_are_written_if_asked(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = next(iter(RECORDS))

    def proving(model: PreTrainedModel, records: Sequence[EncodedRecord], adapter: str, *arguments: Any) -> Proof:
        if odd in [record.record.key for record in records]:
            raise RecallError("never", key=odd, adapter=adapter)
        return prove(model, records, adapter, *arguments)

    monkeypatch.setattr(shards, "prove", proving)
    with MemoryStore(tmp_path / "m", str(base)) as store:
        with pytest.raises(StubbornRecords, match=f"1 records could not be certified.*{odd}"):
            store.write(RECORDS)
        assert list(store.keys()) == []
        report = store.write(RECORDS, partial=True)
        assert report.failed == (odd,) and set(store.keys()) == RECORDS.keys() - {odd}


def test_a_certificate_too_low_in_bfloat16_alone_is_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def proving(
        model: PreTrainedModel,
        records: Sequence[EncodedRecord],
        adapter: str,
        dtypes: dict[str, str],
        ending: Ending | None,
    ) -> Proof:
        proof = prove(model, records, adapter, dtypes, ending)
        low = (CERTIFIED - 0.01,) * len(records)
        return Proof(low, proof.conditions) if dtypes["base"] == "bfloat16" else proof

    monkeypatch.setattr(shards, "prove", proving)
    with MemoryStore(tmp_path / "m", str(base)) as store:
        with pytest.raises(StubbornRecords, match=r"p = 0\.590 in bfloat16"):
            store.write(RECORDS)
        assert store.adapters() == []


def test_a_store_in_bfloat16_serves_itself(
    base: Path, tmp_path: Path, watched: Callable[[Callable[[str, float], bool]], Watched]
) -> None:
    proved = watched(lambda *_: False)
    with MemoryStore(tmp_path / "m", str(base), dtype="bfloat16") as store:
        store.write(RECORDS)
        assert store.manifest.serve == ()
        (adapter,) = store.adapters()
        assert adapter.proof["served"] == {}
        assert adapter.proof["dtypes"] == {"base": "bfloat16", "adapter": "float32"}
        assert adapter.proof["min_prob"] >= CERTIFIED
    assert proved == [("bfloat16", shards.CAUTION[0])]
    with MemoryStore(tmp_path / "m", create=False) as store:
        assert {key: store.recall(key) for key in RECORDS} == RECORDS


@pytest.mark.parametrize("through_the_network", [False, True])
def test_where_there_are_no_deviations_caution_asks_for_higher_probabilities(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, through_the_network: bool
) -> None:
    """Training knows one dtype alone: its own, or, through the network, that of the base."""
    aims, certificates, steps = list[float](), list[float](), list[int]()

    def train(*arguments: Any, **named: Any) -> ShardTraining:
        aims.append(arguments[5].certify_threshold)
        trained = train_shard(*arguments, **named)
        steps.append(trained.training.steps)
        return trained

    def proving(*arguments: Any) -> Proof:
        proof = prove(*arguments)
        certificates.append(proof.min_prob)
        if len(aims) < len(shards.CAUTION):
            raise RecallError("not yet", key="k", adapter="a")
        return proof

    train_shard = shards.train_shard
    monkeypatch.setattr(shards, "train_shard", train)
    monkeypatch.setattr(shards, "prove", proving)
    if through_the_network:
        monkeypatch.setattr(shards, "features_of", lambda *_: None)
    with MemoryStore(tmp_path / "m", str(base), serve=()) as store:
        report = store.write(RECORDS)
        assert aims == pytest.approx([0.6, 0.7, 0.76])
        assert all(reached >= aim for reached, aim in zip(certificates, aims, strict=True))
        assert report.min_prob == certificates[-1]
        assert report.steps == sum(steps)  # what was refused took its time too
        assert {key: store.recall(key) for key in RECORDS} == RECORDS


def test_the_manifest_keeps_the_dtypes_and_an_older_one_has_none(base: Path, tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "m", str(base)) as store:
        content = store.manifest.to_bytes()
        assert Manifest.from_bytes(content, tmp_path) == store.manifest
    fields = json.loads(content)
    assert fields.pop("serve") == ["bfloat16"]
    assert Manifest.from_bytes(json.dumps(fields).encode(), tmp_path).serve == ()


def test_a_store_from_before_writes_at_its_deep_placement_as_ever(
    tmp_path: Path, watched: Callable[[Callable[[str, float], bool]], Watched]
) -> None:
    """Through layers, proved in its own dtype alone; what it held comes back as well."""
    shutil.copytree(ROOT / "tests" / "store-format-1", tmp_path / "m")
    stored = json.loads((tmp_path / "m" / "store.json").read_bytes())
    assert "serve" not in stored
    proved = watched(lambda *_: False)
    with MemoryStore(tmp_path / "m", create=False) as store:
        before = {(record.namespace, record.key): record.value for record in store.records()}
        assert store.manifest.serve == ()
        assert stored["placement"] == {
            "modules": list(Placement.default(store.base.model).modules),
            "layers": list(Placement.default(store.base.model).layers),
        }
        old = {adapter.id for adapter in store.adapters()}
        store.write({"a new key": "42"})
        (added,) = [adapter for adapter in store.adapters() if adapter.id not in old]
        assert json.loads(json.dumps(added.placement)) == stored["placement"]
        assert added.proof["served"] == {}
    assert [dtype for dtype, _ in proved] == ["float32"]
    assert json.loads((tmp_path / "m" / "store.json").read_bytes()) == stored
    with MemoryStore(tmp_path / "m", create=False) as store:
        assert store.recall("a new key") == "42"
        assert {(namespace, key): store.recall(key, namespace=namespace) for namespace, key in before} == before
