"""What servers of PEFT LoRA adapters take, refuse and silently get wrong: rules over configs and tensor headers.

Read in the sources, or run where it says so; a later version may take more:

- vLLM, main of 2026, 0.32, and 0.6 to 0.20: ``vllm/lora/peft_helper.py`` (``validate_legal``), ``lora/lora_model.py``,
  ``config/lora.py`` (ranks), ``plugins/lora_resolvers/filesystem_resolver.py``; docs.vllm.ai/en/latest/features/lora
- SGLang, main of 2026 and 0.4 to 0.5: ``srt/lora/lora_config.py``, ``lora.py``, ``lora_manager.py``, ``utils.py``;
  docs.sglang.io/advanced_features/lora.html
- PEFT 0.21, which is run: ``tests/test_deploy.py``, ``tests/test_peft_adapters.py``
- llama.cpp, through the package xllamacpp of October 2026, which is run: ``tests/test_llama_cpp.py``
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loramem import embedded
from loramem._util.choices import check_choice
from loramem.models.adapter_config import PLACING, accepted, refusals
from loramem.models.adapter_header import DTYPES, AdapterHeader
from loramem.models.adapter_tensors import EMBEDDINGS, absences, disagreements
from loramem.results import Finding
from loramem.serving.targets import LLAMA_CPP, NAMES, PEFT, SGLANG, TARGETS, VLLM, Target

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What --max-lora-rank may be; a server loads any rank up to its maximum."""
VLLM_DEFAULT_RANK = 16
SGLANG_BATCH = 8
"""Different adapters in one batch, unless --max-loras-per-batch says otherwise; vLLM's --max-loras is 1."""
SGLANG_MODULES = frozenset("q_proj k_proj v_proj o_proj gate_proj up_proj down_proj qkv_proj gate_up_proj".split())
LLAMA_CPP_MODULES = frozenset("q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split())
LLAMA_CPP_ARCHITECTURES = frozenset({"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"})
"""Modules and architectures whose adapters are converted."""
WITHOUT_LORA = {VLLM: frozenset({"GPT2LMHeadModel", "GPTNeoXForCausalLM"}), SGLANG: frozenset({"GPT2LMHeadModel"})}
"""Architectures that the server runs without LoRA layers."""
PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica", "lora_ga"})
"""Ways of initialising after which a loaded adapter is one on the base model as it is; others change that again.

LoRA-GA changes it while it trains, which no loader repeats, PEFT's neither."""


@dataclass(frozen=True)
class Server:
    """What is known of the server that is to load them."""

    target: Target
    max_rank: int | None = None
    """Its maximum, if it is started already; None leaves it to be chosen."""
    base_name: str | None = None
    """The model name or path that it is started with; None: the one in the adapters' configs."""
    base_is_local: bool = False
    """Whether the configs name a model that only this machine has."""
    architecture: str | None = None
    """First of "architectures" in the base model's config.json."""
    rewritten: bool = False
    """Whether `loramem deploy` writes the adapters with `base_name`: of a store they are no files to be served yet."""
    compared: bool = False
    """Whether the tensors are compared with the base model itself, which knows what modules it has."""

    def __post_init__(self) -> None:
        check_choice("target", self.target, TARGETS)


Rule = Callable[[AdapterHeader, Server], Iterator[Finding]]


@dataclass(frozen=True)
class Feature:
    """A field of adapter_config.json beyond plain LoRA, and what becomes of it."""

    field: str
    plain: Callable[[Any], bool]
    """Whether a value means that the feature is not used."""
    fate: Mapping[Target, str]
    """By target, if it is not served as PEFT computes it."""
    remedy: str


_MERGE = "Merge it into the base model and serve that, or write it as plain LoRA."
_IGNORED = "SGLang reads lora_A and lora_B of the layers alone and silently leaves it out"
FEATURES = (
    Feature(
        "bias",
        lambda value: value in (None, "none"),
        {VLLM: 'vLLM refuses it ("Adapter bias is not supported")', SGLANG: _IGNORED},
        'Train with bias="none".',
    ),
    Feature("lora_bias", lambda value: not value, {VLLM: "vLLM refuses or drops it", SGLANG: _IGNORED}, _MERGE),
    Feature("use_dora", lambda value: not value, {VLLM: "vLLM refuses DoRA", SGLANG: "SGLang refuses DoRA"}, _MERGE),
    Feature(
        "use_rslora",
        lambda value: not value,
        {SGLANG: "SGLang scales by alpha/r whatever this says, and silently serves another function"},
        "Set it to false and lora_alpha to alpha·√r, which is the same function.",
    ),
    Feature(
        "modules_to_save",
        lambda value: not value,
        {VLLM: "vLLM refuses adapters that hold whole modules", SGLANG: _IGNORED},
        _MERGE,
    ),
    Feature(
        "trainable_token_indices",
        lambda value: not value,
        {VLLM: "vLLM refuses it, or needs --max-lora-trainable-tokens where it knows that option", SGLANG: _IGNORED},
        _MERGE,
    ),
    Feature(
        "rank_pattern",
        lambda value: not value,
        {
            VLLM: "older versions of vLLM scale every module alike, and silently serve another function",
            SGLANG: "SGLang takes one rank and one scaling per adapter",
        },
        "Write it with one rank and one alpha.",
    ),
    Feature(
        "alpha_pattern",
        lambda value: not value,
        {
            VLLM: "older versions of vLLM scale every module alike, and silently serve another function",
            SGLANG: "SGLang takes one rank and one scaling per adapter",
        },
        "Write it with one rank and one alpha.",
    ),
    Feature(
        "layer_replication",
        lambda value: not value,
        {VLLM: "vLLM does not copy layers", SGLANG: "SGLang does not copy layers"},
        _MERGE,
    ),
    Feature(
        "alora_invocation_tokens",
        lambda value: not value,
        {VLLM: "vLLM does not switch adapters on within a prompt", SGLANG: "SGLang would apply it to every token"},
        _MERGE,
    ),
    Feature(
        "use_bdlora",
        lambda value: not value,
        {VLLM: "vLLM refuses block-diagonal matrices", SGLANG: "SGLang takes the blocks for whole matrices"},
        _MERGE,
    ),
    Feature(
        "use_qalora",
        lambda value: not value,
        {VLLM: "vLLM refuses QALoRA", SGLANG: "SGLang does not pool the inputs in groups"},
        "Write it as plain LoRA.",
    ),
    *(
        Feature(field, lambda value: not value, {VLLM: f"vLLM knows no tensors of {name}", SGLANG: _IGNORED}, _MERGE)
        for field, name in (("kasa_config", "KaSA"), ("velora_config", "VeLoRA"), ("monteclora_config", "MonteCLoRA"))
    ),
    Feature(
        "target_parameters",
        lambda value: not value,
        {VLLM: "vLLM has other names for the matrices of experts", SGLANG: "SGLang has no LoRA on such parameters"},
        "Adapt linear layers alone, or serve it with PEFT.",
    ),
    Feature(
        "init_lora_weights",
        lambda value: not isinstance(value, str) or value.lower() in PLAIN_INITS,
        {
            VLLM: "this way of initialising changed the base model, which vLLM does not do again",
            SGLANG: "this way of initialising changed the base model, which SGLang does not do again",
        },
        "Convert it with PEFT's path_initial_model_for_weight_conversion.",
    ),
)


def findings(adapter: AdapterHeader, server: Server) -> list[Finding]:
    """What the server would make of one adapter; empty if it simply loads it."""
    return [finding for rule in RULES for finding in rule(adapter, server)]


def findings_together(adapters: Sequence[AdapterHeader], server: Server) -> list[Finding]:
    """What the server must be started with so that it takes all of them; notes alone, except of the rank it has."""
    return list(RULES_TOGETHER[server.target](adapters, server)) if adapters else []


def max_rank_option(rank: int) -> int | None:
    """The smallest --max-lora-rank of vLLM that admits a rank; None beyond the largest."""
    return next((choice for choice in VLLM_RANKS if choice >= rank), None)


# Rules of one adapter


def _kind(adapter: AdapterHeader, server: Server) -> Iterator[Finding]:
    if (kind := adapter.config.get("peft_type")) != "LORA":
        yield _refused(adapter, server, "kind", f"peft_type {kind!r}", "only LORA is loaded here", "Use a LoRA.")


def _config(adapter: AdapterHeader, server: Server) -> Iterator[Finding]:
    """Values that PEFT refuses; of those that say where tensors are no other loader makes sense either."""
    for field, what, why in refusals(adapter.config):
        if server.target == PEFT or (field in PLACING and adapter.config.get(field) is not None):
            yield _refused(adapter, server, field, what, f"PEFT refuses it: {why}", "Save the adapter again.")


def _features(adapter: AdapterHeader, server: Server) -> Iterator[Finding]:
    for feature in FEATURES:
        value, fate = adapter.config.get(feature.field), feature.fate.get(server.target)
        if server.target == LLAMA_CPP:
            fate = "a GGUF adapter holds A, B and one alpha, and nothing else"
        if fate is not None and not feature.plain(value):
            yield _refused(adapter, server, feature.field, f"{feature.field} {value!r}", fate, feature.remedy)


def _begun(adapter: AdapterHeader, server: Server) -> Iterator[Finding]:
    if adapter.config.get("init_lora_weights") == "lora_ga":
        why = "LoRA-GA takes its start out of the base model while it trains, and no loader does that again"
        remedy = "Save it with PEFT's path_initial_model_for_weight_conversion, unless that was done."
        yield Finding(
            server.target, adapter.name, "init_lora_weights", False, "init_lora_weights 'lora_ga'", why, remedy
        )


def _rank(adapter: AdapterHeader, server: Server) -> Iterator[Finding]:
    rank, what = adapter.rank, f"rank {adapter.rank}"
    if rank < 1:
        yield _refused(adapter, server, "rank", what, "a rank is 1 or more", "Write the adapter again.")
    elif server.target == VLLM and max_rank_option(rank) is None:
        why = f"vLLM's --max-lora-rank ends at {VLLM_RANKS[-1]}"
        yield _refused(adapter, server, "rank", what, why, "Write the records into more adapters of a smaller rank.")
    elif server.target in (VLLM, SGLANG) and server.max_rank is not None and rank > server.max_rank:
        enough = max_rank_option(rank) if server.target == VLLM else rank
        why = f"the server's maximum is {server.max_rank}"
        yield _refused(adapter, server, "rank", what, why, f"Start it with --max-lora-rank {enough}.")


def _modules(adapter: AdapterHeader, server: Server) -> Iterator[Finding]:
    modules, asked = adapter.modules, adapter.config.get("target_modules")
    if server.target == SGLANG and isinstance(asked, str) and asked not in ("all", "all-linear"):
        why = "SGLang takes a list of names, no pattern"
        yield _refused(adapter, server, "modules", f"target_modules {asked!r}", why, "Write the list out.")
    if server.target == PEFT:
        return
    if found := sorted(modules & EMBEDDINGS):
        why = f"{NAMES[server.target]} serves adapted embeddings for some models and versions only"
        yield _refused(adapter, server, "modules", f"module {', '.join(found)}", why, "Adapt linear layers alone.")
    for target, layers in ((SGLANG, SGLANG_MODULES), (LLAMA_CPP, LLAMA_CPP_MODULES)):
        if server.target == target and (unknown := sorted(modules - layers - EMBEDDINGS)):
            why = f"{NAMES[target]}'s LoRA layers are {', '.join(sorted(layers))}"
            yield _refused(adapter, server, "modules", f"module {', '.join(unknown)}", why, "Use vLLM or PEFT.")
    if server.target == SGLANG:
        yield from _stacked(adapter, server)


def _stacked(adapter: AdapterHeader, server: Server) -> Iterator[Finding]:
    """SGLang stacks q, k and v starting from q, and gate and up starting from gate."""
    layers: dict[str, set[str]] = {}
    for module in adapter.matrices():
        path, _, name = module.rpartition(".")
        layers.setdefault(path, set()).add(name)
    for names in layers.values():
        attention = names & {"q_proj", "k_proj", "v_proj"}
        alone = "up_proj" in names and "gate_proj" not in names
        if attention and not {"q_proj", "v_proj"} <= names:
            what, need = f"only {', '.join(sorted(attention))} of q, k and v", "q_proj and v_proj"
        elif alone:
            what, need = "up_proj without gate_proj", "gate_proj"
        else:
            continue
        why = f"SGLang stacks them and needs {need}"
        yield _refused(adapter, server, "modules", what, why, "Adapt all of them, or use vLLM or PEFT.")
        return


def _architecture(adapter: AdapterHeader, server: Server) -> Iterator[Finding]:
    if server.architecture in WITHOUT_LORA.get(server.target, frozenset()):
        why = f"{NAMES[server.target]} has no LoRA layers for this architecture"
        remedy = "Serve it with PEFT, or merge the adapter into the base model."
        yield _refused(adapter, server, "architecture", f"base model {server.architecture}", why, remedy)
    elif server.target == LLAMA_CPP and server.architecture not in (None, *LLAMA_CPP_ARCHITECTURES):
        why = f"converted are those of {', '.join(sorted(LLAMA_CPP_ARCHITECTURES))}"
        remedy = "Serve it with PEFT, or convert it with llama.cpp's convert_lora_to_gguf.py and check the server."
        yield _refused(adapter, server, "architecture", f"base model {server.architecture}", why, remedy)
    elif adapter.config.get("fan_in_fan_out") and server.target != PEFT:
        why = f"{NAMES[server.target]} has no LoRA layers on transposed weights (Conv1D, as in GPT-2)"
        yield _refused(adapter, server, "architecture", "fan_in_fan_out true", why, "Serve it with PEFT.")


def _tensors(adapter: AdapterHeader, server: Server) -> Iterator[Finding]:
    """What the file holds must be what the config says: PEFT and servers fill gaps with zeros or random numbers."""
    readable = replace(adapter, config=accepted(adapter.config))
    for what in disagreements(readable):
        why = "config and weights contradict each other, and loaders would fill in or leave out in silence"
        yield _refused(adapter, server, "tensors", what, why, "Save the adapter again.")
    for what in absences(readable) if not server.compared else ():
        why = "either they were lost, or the base model has no such module"
        yield _refused(adapter, server, "tensors", what, why, "Save the adapter again, or let --model tell which.")
    if adapter.not_finite:
        what = f"tensor {adapter.not_finite[0]} with NaN or Inf in it"
        yield _refused(adapter, server, "values", what, "what passes through it is lost", "Train the adapter again.")
    unknown = {header.dtype for header in adapter.tensors.values()} - set(DTYPES)
    if unknown:
        why = f"weights are {', '.join(DTYPES.values())} here"
        yield _refused(adapter, server, "dtype", f"dtype {', '.join(sorted(unknown))}", why, "Save the adapter again.")


def _base(adapter: AdapterHeader, server: Server) -> Iterator[Finding]:
    if server.target != VLLM:  # the others are given a base model and do not look at this field
        return
    named = adapter.config.get("base_model_name_or_path")
    resolver = "vLLM's filesystem resolver loads an adapter only if this equals the name the server is started with"
    remedy = "loramem deploy --target vllm --base-name NAME writes it as you name the model to vllm serve."
    if named == embedded.NAME:
        remedy += " The folder of loramem-tiny is what loramem.base_path() gives in Python."
    if server.base_name is not None and named != server.base_name:
        what, why = f"base_model_name_or_path {named!r}", f"{resolver}, {server.base_name!r}"
        yield replace(_refused(adapter, server, "base", what, why, remedy), refused=not server.rewritten)
    elif not named or (server.base_name is None and (server.base_is_local or named == embedded.NAME)):
        why = f"{resolver}, and no server finds a model by this one"
        yield _refused(adapter, server, "base", f"base_model_name_or_path {named!r}", why, remedy)


RULES: tuple[Rule, ...] = (_kind, _config, _features, _begun, _rank, _modules, _architecture, _tensors, _base)


# Rules of all adapters together


def _vllm_together(adapters: Sequence[AdapterHeader], server: Server) -> Iterator[Finding]:
    rank, count = max(adapter.rank for adapter in adapters), len(adapters)
    if server.max_rank is not None and server.max_rank not in VLLM_RANKS:
        choices = ", ".join(map(str, VLLM_RANKS))
        why = f"vLLM takes {choices}"
        remedy = f"Use {max_rank_option(server.max_rank) or VLLM_RANKS[-1]}."
        yield Finding(VLLM, None, "rank", True, f"--max-lora-rank {server.max_rank}", why, remedy)
    elif server.max_rank is None and rank > VLLM_DEFAULT_RANK and (option := max_rank_option(rank)):
        why = f"vLLM's maximum is {VLLM_DEFAULT_RANK} unless it is told"
        yield _note(server, "rank", f"rank {rank}", why, f"Start it with --max-lora-rank {option}.")
    if count > 1:
        why = "with --max-loras 1, the default, requests for different ones take turns"
        yield _note(server, "count", f"{count} adapters", why, "Start it with --max-loras as memory allows.")
    yield from _revision(adapters, server)


def _sglang_together(adapters: Sequence[AdapterHeader], server: Server) -> Iterator[Finding]:
    rank, count = max(adapter.rank for adapter in adapters), len(adapters)
    sets = Counter(adapter.modules for adapter in adapters)
    if len(sets) > 1:
        union = " ".join(sorted(frozenset().union(*sets)))
        why = "SGLang reserves memory for the modules of those it is started with"
        remedy = f"Start it with --lora-target-modules {union} --max-lora-rank {rank}."
        yield _note(server, "modules", f"{len(sets)} different sets of modules", why, remedy)
    if count > SGLANG_BATCH:
        why = f"a batch holds {SGLANG_BATCH} different ones, the base model among them"
        yield _note(server, "count", f"{count} adapters", why, "Start it with --max-loras-per-batch as memory allows.")
    yield from _revision(adapters, server)


def _llama_cpp_together(adapters: Sequence[AdapterHeader], server: Server) -> Iterator[Finding]:
    if revisions := {str(found) for adapter in adapters if (found := adapter.config.get("revision"))}:
        why = "llama.cpp does not compare an adapter with its base"
        yield _note(server, "revision", "a pinned base", why, f"Convert the base model of revision {min(revisions)}.")


def _revision(adapters: Sequence[AdapterHeader], server: Server) -> Iterator[Finding]:
    if revisions := {str(found) for adapter in adapters if (found := adapter.config.get("revision"))}:
        why = f"{NAMES[server.target]} does not read it from the adapter"
        yield _note(server, "revision", "a pinned base", why, f"Start it with --revision {min(revisions)}.")


RULES_TOGETHER: Mapping[Target, Callable[[Sequence[AdapterHeader], Server], Iterator[Finding]]] = {
    PEFT: lambda _adapters, _server: iter(()),
    VLLM: _vllm_together,
    SGLANG: _sglang_together,
    LLAMA_CPP: _llama_cpp_together,
}


def _refused(adapter: AdapterHeader, server: Server, rule: str, what: str, why: str, remedy: str) -> Finding:
    return Finding(server.target, adapter.name, rule, True, what, why, remedy)


def _note(server: Server, rule: str, what: str, why: str, remedy: str) -> Finding:
    return Finding(server.target, None, rule, False, what, why, remedy)
