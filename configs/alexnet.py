"""AlexNet on CIFAR-10; `:images_set` for a folder of photos at 112 px.

python main.py --config=configs/alexnet.py
"""

from ml_collections import ConfigDict

from configs import default


def get_config(dataset: str = "cifar10") -> ConfigDict:
    config = default.get_config(dataset)
    config.model.name = "alexnet"
    config.model.options = {"dropout": 0.5}
    config.optimizer.learning_rate = 0.01
    return config
