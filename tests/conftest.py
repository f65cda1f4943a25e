"""Small base models of several architectures, built here, and where optional material lies."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing in the tests may reach the network
if "PYTEST_XDIST_WORKER" in os.environ:  # a worker per core; processes that tests start take one thread too
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import importlib.util
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import huggingface_hub.constants
import hypothesis
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)
from transformers.models.auto import AutoModelForCausalLM

from loramem.training import shard_training, trainer

from .hub_server import HubServer

hypothesis.settings.register_profile("unhurried", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("unhurried")

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"  # the paper's data and a model pretrained by others; tests pass without it

VOCABULARY, WIDTH, LAYERS, CONTEXT = 512, 64, 3, 1024
SPECIALS = ["<pad>", "<eos>", "<user>", "<assistant>"]
CHAT = (
    "{% for m in messages %}{{ '<assistant>' if m['role'] == 'assistant' else '<user>' }}{{ m['content'] }}<eos>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TEXT = ["The quick brown fox jumps over the lazy dog.", "def write(records): return [r.key for r in records]"] * 20


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--runslow", action="store_true", help="also run tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--runslow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow; needs --runslow"))


def configuration(architecture: str) -> PreTrainedConfig:
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    grouped = {"num_key_value_heads": 2}
    return {
        "qwen3": lambda: Qwen3Config(**shape, **grouped, head_dim=16),
        "llama": lambda: LlamaConfig(**shape, **grouped),
        "mistral": lambda: MistralConfig(**shape, **grouped, sliding_window=None),
        "gpt_neox": lambda: GPTNeoXConfig(**shape),
    }[architecture]()


def save_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        pad_token="<pad>",
        additional_special_tokens=["<user>", "<assistant>"],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT
    fast.save_pretrained(folder)


def build_base(folder: Path, architecture: str, seed: int = 0) -> Path:
    """A random model whose head can pass p = 0.9 for every token: logits must spread well beyond ln(vocabulary)."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(configuration(architecture))
    head = model.get_output_embeddings().weight.data
    head.normal_(std=(math.log(VOCABULARY) + 12) / WIDTH)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folder of a random base model of an architecture; the same arguments give the same folder."""
    made: dict[tuple[str, int], Path] = {}

    def get(architecture: str = "qwen3", seed: int = 0) -> Path:
        if (architecture, seed) not in made:
            folder = tmp_path_factory.mktemp(f"base-{seed}") / f"tiny-{architecture}"
            made[architecture, seed] = build_base(folder, architecture, seed)
        return made[architecture, seed]

    return get


@pytest.fixture(scope="session")
def base(base_of: Callable[..., Path]) -> Path:
    return base_of("qwen3")


@pytest.fixture(autouse=True, scope="session")
def private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The cache of the person who runs the tests is left alone, by fixtures of any scope too."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """A test that sets torch's threads sets them for itself alone: two where there is one core cost minutes."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def numbers(count: int, digits: int = 4) -> dict[str, str]:
    """Records for small models: short keys, random digits, the same on every run."""
    import random

    rng = random.Random(7)
    return {f"key {i}": "".join(rng.choices("0123456789", k=digits)) for i in range(count)}


@contextmanager
def hub_client(server: HubServer, home: Path) -> Iterator[None]:
    """huggingface_hub pointed at a server of ours with an empty cache, in this process and those it starts.

    huggingface_hub reads its environment into `huggingface_hub.constants` when it is first imported, long before
    this. So that module is read once more under the new environment, and what came out otherwise is patched into
    the one in use: its own functions look there at every call, `HfApi()` and `hf_hub_download` with no endpoint
    included. Libraries that copied a constant at import keep theirs (transformers: the cache folder). A process that
    a test starts needs the environment alone: it inherits it, or gets `server.environment(home)` for another cache.
    """
    with pytest.MonkeyPatch.context() as patched:
        for name, value in server.environment(str(home)).items():
            patched.setenv(name, value)
        spec = importlib.util.find_spec("huggingface_hub.constants")
        assert spec and spec.loader
        constants = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(constants)
        for name, value in vars(constants).items():
            if name.isupper() and value != getattr(huggingface_hub.constants, name):
                patched.setattr(huggingface_hub.constants, name, value)
        yield
    huggingface_hub.close_session()  # and its connections to this server


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """A Hub of our own, empty, that the client of this process and of those it starts talks to."""
    with HubServer() as server, hub_client(server, tmp_path_factory.mktemp("hub") / "home"):
        yield server


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training through the network gives a rank up after two passes without progress."""
    schedule = trainer.NetworkSchedule(patience_passes=2)
    monkeypatch.setattr(shard_training, "train_adapter", partial(trainer.train_adapter, schedule=schedule))
