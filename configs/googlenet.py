"""GoogLeNet with BatchNorm on CIFAR-10; `:images_set` for a folder of photos at 112 px.

python main.py --config=configs/googlenet.py
"""

from ml_collections import ConfigDict

from configs import default


def get_config(dataset: str = "cifar10") -> ConfigDict:
    config = default.get_config(dataset)
    config.model.name = "googlenet"
    config.model.options = {"stem": "auto"}
    config.optimizer.learning_rate = 0.2 * config.batch_size / 64
    return config
