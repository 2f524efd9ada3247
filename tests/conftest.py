"""Eight devices on one CPU, and NumPy's silent broadcasting between ranks forbidden."""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # tests neither read nor fill the user's

import jax
import pytest
from ml_collections import ConfigDict

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def config() -> ConfigDict:
    """Sixty steps of LeNet-5 on made images; a log every 7 steps, a checkpoint every 10."""
    from configs import default

    config = default.get_config("fake")
    config.augment.update(crop_padding=2, flip="random")
    config.num_steps = 60
    config.batch_size = 32
    config.log_every_steps = 7
    config.checkpoint_every_steps = 10
    config.schedule.warmup_steps = 5
    return config
