"""Compiled layers on the device: programs, graph breaks and numbers; and that Inductor's kernels compile for an H200.

The device cannot run kernels. So the compiler does all its work up to them, and its graphs run operator by operator.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from crate_ray.config import CrateMAEConfig, FinetuneConfig, ModelConfig, PrepareConfig, ViTMAEConfig
from crate_ray.data.prepare.builtin import digits_source
from crate_ray.data.prepare.packing import pack
from crate_ray.finetuning.run import open_finetuning
from crate_ray.finetuning.task import FinetuneTask
from crate_ray.models import build_model
from crate_ray.models.kernels import attention
from crate_ray.models.kernels.float8 import use_float8
from crate_ray.storage.interface import open_storage
from crate_ray.training.bare_loop import train
from crate_ray.training.compilation import compile_layers
from crate_ray.training.parallel import parallelize
from tests.gpu_emulated.test_step import MODELS

pytest.importorskip("triton")

DEPTH = 3
"""Layers of each kind; they share programs."""
LARGEST = 4
"""Samples of the largest micro-batch."""

# --- The compiler, without launching kernels ------------------------------------------------------------------------


class Compiler:
    """Stands in for Inductor in torch.compile, and counts. Programs of all calls before are forgotten."""

    def __init__(self) -> None:
        from torch._dynamo.utils import counters
        from torch._inductor import config

        config.compile_threads = 1  # before compile_fx is imported, which else starts processes
        from torch._inductor.compile_fx import compile_fx
        from torch._inductor.fx_passes import pad_mm

        self.passes: Counter[str] = Counter()
        """Passes of compiled layers, forward and backward."""
        self.generate: Callable[..., Any] | None = None
        """Inductor's code generation, if it is to run; graphs then return blank tensors."""
        self._counters = counters
        torch._dynamo.reset()
        counters.clear()
        # Inductor measures whether larger, aligned matrices are faster. This needs a GPU; here they never are.
        pad_mm.get_do_bench = lambda: lambda _: 1.0
        self.backend = partial(compile_fx, inner_compile=self._compile_graph)

    @property
    def programs(self) -> int:
        """Programs that were compiled."""
        return int(self._counters["stats"]["unique_graphs"])

    @property
    def breaks(self) -> dict[str, int]:
        """Causes of graph breaks, and of code that was left uncompiled."""
        return dict(self._counters["graph_break"]) | dict(self._counters["unimplemented"])

    def _compile_graph(self, graph: torch.fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
        """For one half of a program. It was decomposed, partitioned and simplified by Inductor already."""
        half = "backward" if options.get("is_backward") else "forward"
        returned: Any = graph.graph.output_node().args[0]
        blanks = [node.meta["val"] if isinstance(node, torch.fx.Node) else node for node in returned]
        if self.generate is not None:
            self.generate(graph, inputs, **options)

        def run(given: list[Any]) -> list[Any]:
            self.passes[half] += 1
            results = list(graph.forward(*given)) if self.generate is None else [_blank(value) for value in blanks]
            given.clear()
            return results

        run._boxed_call = True  # type: ignore[attr-defined]
        return run


def _blank(like: Any) -> Any:
    if not isinstance(like, Tensor):
        return like
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiler]:
    from torch._inductor.fx_passes import pad_mm

    monkeypatch.setattr(pad_mm, "get_do_bench", pad_mm.get_do_bench)
    made = Compiler()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=made.backend))
    yield made
    torch._dynamo.reset()


# --- Programs -------------------------------------------------------------------------------------------------------


def inputs(config: ModelConfig, count: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(count)
    return torch.randn(count, 3, *config.image_hw).cuda(), torch.rand(count, config.num_patches).cuda()


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


class Expected(NamedTuple):
    config: ModelConfig
    autocast: torch.dtype | None
    programs: int
    """For each number of samples: one for each kind of layer and dtype of its tokens."""
    checkpointed: bool = False
    own_kernel: bool = False


BF16 = torch.bfloat16
# In bf16, the first layer of CRATE's decoder gets tokens in fp32, from a norm. The others get bf16, from a product.
CASES: dict[str, Any] = {
    "crate_mae": Expected(MODELS["crate_mae"], BF16, 3),
    "vit_mae": Expected(MODELS["vit_mae"], BF16, 2),
}
DAILY: dict[str, Any] = {
    "crate_mae, recomputed": Expected(MODELS["crate_mae"], BF16, 3, checkpointed=True),
    "tied decoder": Expected(MODELS["tied decoder"], BF16, 3),
    "linear attention": Expected(MODELS["linear attention"], BF16, 3),
    "visible tokens": Expected(MODELS["visible tokens"], BF16, 3),
    "fp32, own kernel": Expected(MODELS["crate_mae"], None, 2, own_kernel=True),
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=[pytest.mark.daily] * (name in DAILY))
        for name, case in (CASES | DAILY).items()
    ],
)
def test_layers_are_compiled_whole_and_once_for_each_kind_and_number_of_samples(
    case: Expected, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = case.config.model_copy(update={"depth": DEPTH, "decoder_depth": DEPTH})
    if case.own_kernel:
        monkeypatch.setattr(attention, "_fused_is_faster", {(17, 8, torch.float32)})
    torch.manual_seed(0)
    model = build_model(config).cuda()
    eager = build_model(config).cuda()
    eager.load_state_dict(model.state_dict())
    model.checkpoint_layers = eager.checkpoint_layers = case.checkpointed
    layers = [*model.encoder, *model.decoder]
    assert compile_layers(model, layers, inputs(config, LARGEST), case.autocast, required=True)
    assert not compiler.breaks and compiler.programs == case.programs

    passes = compiler.passes["backward"]
    for step, count in enumerate((LARGEST, LARGEST - 1, LARGEST), start=1):
        found = []
        for trained in (model, eager):
            trained.zero_grad(set_to_none=True)
            with torch.autocast("cuda", dtype=case.autocast, enabled=case.autocast is not None):
                loss = trained(*inputs(config, count)).loss
            loss.backward()
            found.append([loss.detach(), *(weight.grad for weight in trained.parameters() if weight.grad is not None)])
        # Every layer runs its program; none went back to uncompiled code.
        assert compiler.passes["backward"] == passes + 2 * DEPTH * step
        assert not compiler.breaks and compiler.programs == case.programs * min(step, 2)
        assert len(found[0]) == len(found[1]) == len(list(model.parameters())) + 1
        tolerance = 1e-5 if case.autocast is None else 0.02
        assert max(relative(*pair) for pair in zip(*found, strict=True)) < tolerance
    with torch.no_grad():  # as in validation
        model(*inputs(config, 1))
    assert compiler.programs == 2 * case.programs
    assert all("forward" in vars(layer) for layer in layers)


def test_fine_tuning_with_drop_path_uses_the_programs_that_were_compiled_at_start(
    compiler: Compiler, tmp_path: Path
) -> None:
    data = PrepareConfig(source="digits", split="test", output=str(tmp_path / "digits"))
    pack(digits_source("test"), open_storage(data.output, data.s3), data)
    sizes: dict[str, Any] = {"image_size": 8, "channels": 1, "patch_size": 2}
    config = FinetuneConfig.model_validate(
        {
            "model": "scratch",
            "encoder": CrateMAEConfig(**sizes, dim=32, depth=3, num_subspaces=4),
            "storage": str(tmp_path / "runs"),
            "data": {"train": data.output, "flip": False},
            "drop_path": 0.2,
            "training": {"steps": 3, "batch_size": 22, "micro_batch_size": 6, "precision": "fp32"},  # 5, 6, 5, 6
            "tracking": {"log_every": 1},
        }
    )
    run = open_finetuning(config, lambda reference: pytest.fail(reference))
    train(FinetuneTask, config, run.record, run.total_steps)
    assert not compiler.breaks and compiler.programs == 2
    assert compiler.passes["forward"] == (1 + 3 * 4) * 3


# --- Kernels --------------------------------------------------------------------------------------------------------


class Generated(NamedTuple):
    """A model whose kernels are compiled. Sizes are those of real runs, so Inductor's blocks are, too."""

    config: ModelConfig
    batch: int = 128
    autocast: torch.dtype | None = BF16
    sharded: bool = False
    bf16_tokens: bool = False
    float8: bool = False
    padded: bool = False
    """Inductor aligns all matrices."""
    autotuned: bool = False
    """Products are Inductor's own kernels, as training.compile 'autotune' allows."""


BASE: dict[str, Any] = {"image_size": 224, "patch_size": 16, "dim": 768, "depth": 2}
CRATE_BASE = CrateMAEConfig(**BASE, num_subspaces=12)
GENERATED = {
    "crate_mae": Generated(CRATE_BASE),
    "crate_mae, fp32": Generated(CRATE_BASE, autocast=None),
    "crate_mae, sharded": Generated(CRATE_BASE, sharded=True),
    "crate_mae, bf16 tokens": Generated(CRATE_BASE, bf16_tokens=True),
    "crate_mae, float8": Generated(CRATE_BASE, float8=True),
    "crate_mae, autotuned": Generated(CRATE_BASE, bf16_tokens=True, autotuned=True),
    "crate_mae, an odd batch": Generated(CRATE_BASE, batch=125, padded=True),
    "tied maps, linear attention": Generated(
        CRATE_BASE.model_copy(update={"output_map": "tied", "decoder_maps": "tied", "attention": "linear"})
    ),
    "vit_mae": Generated(ViTMAEConfig(**BASE, num_heads=12, decoder_dim=512, decoder_depth=2, decoder_num_heads=16)),
}


@pytest.mark.daily
@pytest.mark.parametrize("case", GENERATED)
def test_generated_kernels_compile_for_hopper(case: str, tmp_path: Path) -> None:
    """In a process in which Triton compiles instead of interpreting. It needs no GPU."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    done = subprocess.run([sys.executable, "-c", GENERATE, case], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    *kernels, counts = [json.loads(line) for line in done.stdout.splitlines()]
    assert counts["breaks"] == {} and counts["programs"] <= 3
    assert Counter(kernel["half"] for kernel in kernels).keys() == {"forward", "backward"}
    assert len(kernels) >= 20
    if GENERATED[case].autotuned:
        products = [kernel["name"] for kernel in kernels if "_tem_" in kernel["name"]]
        for epilogue in ("add_mm_relu_sub", "addmm_sub", "mm_threshold_backward"):  # ISTA, decoder, ISTA backward
            assert any(epilogue in name.replace("_unsafe_view_", "").replace("_t_", "_") for name in products), products
    for kernel in kernels:
        blocks = kernel["blocks"]
        assert len(blocks) == kernel["choices"] > 0, kernel
        assert all(block["target"] == {"backend": "cuda", "arch": 90, "warp_size": 32} for block in blocks), kernel
        assert all(block["shared"] <= 227 * 1024 for block in blocks), kernel
        # Inductor measures its choices and takes the fastest, never one that spills much.
        assert any(block["registers"] <= 255 and block["stack"] == block["local"] == 0 for block in blocks), kernel


GENERATE = """
import sys
from tests.gpu_emulated import device

device.install()

from tests.gpu_emulated.test_inductor import generate

generate(sys.argv[1])
"""


def generate(name: str) -> None:
    """Compile a model's layers with all of Inductor. Prints a line for each kernel, and the number of programs."""
    import torch._inductor.config
    from torch.testing._internal.distributed.fake_pg import FakeStore

    case = GENERATED[name]
    compiler = Compiler()
    from torch._inductor.compile_fx import compile_fx_inner

    compiler.generate = compile_fx_inner
    torch._inductor.config.force_shape_pad = case.padded
    torch.compile = partial(torch.compile, backend=compiler.backend)
    if case.autotuned:
        choose_triton_products()
    compile_kernels_for_hopper()
    model: Any = build_model(case.config).cuda()
    model.bf16_tokens = case.bf16_tokens
    layers = [*model.encoder, *model.decoder]
    if case.float8:
        use_float8(layers)
    if case.sharded:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
        parallelize(model, layers, "fsdp", world_size=2, device=torch.device("cuda"), autocast=case.autocast)
    compile_layers(model, layers, inputs(case.config, case.batch), case.autocast, required=True)
    print(json.dumps({"programs": compiler.programs, "breaks": compiler.breaks}))


def choose_triton_products() -> None:
    """Of the kernels for a product, take the first of Inductor's own. On a GPU it takes the one that is fastest."""
    import torch._inductor.config
    from torch._inductor.select_algorithm import TritonTemplateCaller, add_preprocessing_fn

    torch._inductor.config.max_autotune_gemm = True
    add_preprocessing_fn(lambda choices: [c for c in choices if isinstance(c, TritonTemplateCaller)][:1] or choices)


def compile_kernels_for_hopper() -> None:
    """Compile each kernel that Inductor generates, with all its choices of blocks, and print what came out."""
    import triton
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.codecache import _load_triton_kernel_from_source
    from torch._inductor.runtime.runtime_utils import triton_hash_to_path_key
    from torch._inductor.virtualized import V
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver

    class Driver(CudaDriver):
        """Of an H200, without libcuda."""

        def __init__(self) -> None: ...

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

    def built(result: Any) -> dict[str, Any]:
        folder = Path(os.environ["TRITON_CACHE_DIR"]) / triton_hash_to_path_key(result.kernel.hash)
        (binary,) = folder.glob("*.cubin")
        described = json.loads(binary.with_suffix(".json").read_text())
        return {"target": described["target"], "shared": described["shared"], **resources(binary)}

    compiled: dict[str, Any] = {}

    def compile_kernel(_: Any, kernel_name: str, source_code: str, device_str: str = "cuda") -> Any:
        if source_code in compiled:
            return compiled[source_code]
        compiled[source_code] = kernel = _load_triton_kernel_from_source(kernel_name, source_code)
        choices = len(kernel.configs)
        kernel.precompile(warm_cache_only=True)
        half = "backward" if V.graph.is_backward else "forward"
        blocks = [built(result) for result in kernel.compile_results]
        print(json.dumps({"name": kernel_name, "half": half, "choices": choices, "blocks": blocks}))
        return kernel

    triton.runtime.driver.set_active(Driver())
    AsyncCompile.triton = compile_kernel  # type: ignore[assignment, method-assign]


def resources(binary: Path) -> dict[str, int]:
    """Registers, and bytes of stack and local memory, of each thread of a kernel."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    shown = subprocess.run([tool, "--dump-resource-usage", binary], capture_output=True, text=True, check=True).stdout
    found = {name: re.findall(rf"\b{name}:(\d+)", shown) for name in ("REG", "STACK", "LOCAL")}
    return {
        ours: max(map(int, found[name]))
        for ours, name in (("registers", "REG"), ("stack", "STACK"), ("local", "LOCAL"))
    }
