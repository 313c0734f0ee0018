"""The models: CRATE-MAE and its baseline ViT-MAE. Plain torch, without parallelism, Ray or MLflow.

`crate` has the equations of CRATE-MAE on one page, and `reference` has the same model in its simplest form. `vit` is
the baseline. `autoencoder` and `patches` hold the parts that both models share: patches, masking and loss.
"""

from crate_ray.config import CrateMAEConfig, ViTMAEConfig
from crate_ray.models.autoencoder import Decoded, Encoded, MaskedAutoencoder, MaskedOutput
from crate_ray.models.crate import CrateMAE
from crate_ray.models.patches import Masking
from crate_ray.models.published import export_published, load_published
from crate_ray.models.vit import ViTMAE

__all__ = [
    "CrateMAE",
    "CrateMAEConfig",
    "Decoded",
    "Encoded",
    "MaskedAutoencoder",
    "MaskedOutput",
    "Masking",
    "ViTMAE",
    "ViTMAEConfig",
    "build_model",
    "export_published",
    "load_published",
]


def build_model(config: CrateMAEConfig | ViTMAEConfig) -> CrateMAE | ViTMAE:
    """Build the model that a config describes, with fresh weights from torch's global generator."""
    return CrateMAE(config) if isinstance(config, CrateMAEConfig) else ViTMAE(config)
