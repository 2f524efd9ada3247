"""ResNet-18 on CIFAR-10; `:images_set` for a folder of photos at 112 px.

python main.py --config=configs/resnet18.py
"""

from ml_collections import ConfigDict

from configs import default


def get_config(dataset: str = "cifar10") -> ConfigDict:
    config = default.get_config(dataset)
    config.model.name = "resnet18"
    # Shallow networks learn more in few epochs with all blocks at work from the start.
    config.model.options = {"stem": "auto", "zero_init_last": False}
    config.optimizer.learning_rate = 0.1 * config.batch_size / 64
    return config
