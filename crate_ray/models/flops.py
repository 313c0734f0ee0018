"""Floating-point operations of one training step, by formula, and what GPUs can do: their ratio over time is the MFU.

Counted are the matrix products that our models perform, forward and backward, two operations per multiplication and
addition, as PyTorch's flop counter does; not what is computed a second time to save memory.
"""

from __future__ import annotations

from crate_ray.config import CrateMAEConfig, ModelConfig, ViTMAEConfig

GPU_PEAK_FLOPS: dict[str, float] = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A40": 150e12,
    "A30": 165e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}
"""FLOP/s in bf16 (V100 and T4: fp16) with fp32 sums and without sparsity, from the makers' data sheets, by a part of
the name that torch.cuda.get_device_name gives; the first that fits counts."""


def gpu_peak_flops(name: str) -> float | None:
    """Stated peak of a GPU by its name, FLOP/s in bf16; None for one that is not listed."""
    words = f" {name.replace('-', ' ')} "
    return next((peak for part, peak in GPU_PEAK_FLOPS.items() if f" {part} " in words), None)


def training_flops(config: ModelConfig, batch_size: int) -> int:
    """Operations of one forward and backward pass over a batch of images."""
    if isinstance(config, CrateMAEConfig):
        return _crate_flops(config, batch_size)
    return _vit_flops(config, batch_size)


def plain_training_flops(config: CrateMAEConfig, batch_size: int) -> int:
    """The same for the published model with its equations written out: three products in each ISTA."""
    assert config.subspace_dim is not None and config.decoder_depth is not None
    tokens, dim = batch_size * (1 + config.num_patches), config.dim
    rows = config.num_subspaces * config.subspace_dim
    mssa = 2 * tokens * dim * rows + _attention(batch_size, 1 + config.num_patches, rows)
    encoder = mssa + 3 * tokens * dim * dim
    decoder = mssa + tokens * dim * dim
    layers = 6 * (config.depth * encoder + config.decoder_depth * decoder)
    return layers + _embedding(config, batch_size, dim) + _prediction(config, batch_size, dim)


def _attention(batch: int, tokens: int, rows: int) -> int:
    """Multiplications of the two products with a map, all heads together."""
    return 2 * batch * tokens * tokens * rows


def _embedding(config: ModelConfig, batch: int, dim: int) -> int:
    # The images need no gradient.
    patch_h, patch_w = config.patch_hw
    return 4 * batch * config.num_patches * patch_h * patch_w * config.channels * dim


def _prediction(config: ModelConfig, batch: int, dim: int) -> int:
    patch_h, patch_w = config.patch_hw
    return 6 * batch * config.num_patches * patch_h * patch_w * config.channels * dim


def _crate_flops(config: CrateMAEConfig, batch: int) -> int:
    assert config.subspace_dim is not None and config.decoder_depth is not None
    dim, rows = config.dim, config.num_subspaces * config.subspace_dim

    def mssa(tokens: int) -> int:
        if config.attention == "softmax":
            products = _attention(batch, tokens, rows)
        else:  # w (wᵀ w): two products with a (p × p) matrix
            products = 2 * batch * tokens * rows * (rows // config.num_subspaces)
        return 2 * batch * tokens * dim * rows + products

    def ista(tokens: int) -> int:
        return batch * tokens * dim * dim * (1 if forms_gram(tokens) else 2)

    def forms_gram(tokens: int) -> bool:
        return batch * tokens > dim

    seen = 1 + (config.num_visible if config.encoder_tokens == "visible" else config.num_patches)
    every = 1 + config.num_patches
    encoder = config.depth * (mssa(seen) + ista(seen))
    decoder = config.decoder_depth * (mssa(every) + batch * every * dim * dim)
    # Dᵀ D, a product in each pass, takes the place of the second product of the tokens.
    gram = 4 * config.depth * dim**3 if forms_gram(seen) else 0
    return 6 * (encoder + decoder) + gram + _embedding(config, batch, dim) + _prediction(config, batch, dim)


def _vit_flops(config: ViTMAEConfig, batch: int) -> int:
    assert config.decoder_dim is not None and config.decoder_depth is not None

    def layer(tokens: int, dim: int) -> int:
        linear = 4 * dim * dim + 2 * dim * int(dim * config.mlp_ratio)
        return batch * tokens * linear + _attention(batch, tokens, dim)

    seen, every = 1 + config.num_visible, 1 + config.num_patches
    encoder = config.depth * layer(seen, config.dim)
    decoder = config.decoder_depth * layer(every, config.decoder_dim)
    between = batch * seen * config.dim * config.decoder_dim
    ends = _embedding(config, batch, config.dim) + _prediction(config, batch, config.decoder_dim)
    return 6 * (encoder + decoder + between) + ends
