"""CIFAR-10 in 14 epochs, 94.4 %: the network and recipe of Jordan 2024 (arXiv:2404.00498).

python main.py --config=configs/cifar10_fast.py
"""

from ml_collections import ConfigDict

from configs import default

DECAY = 1.33e-3  # L2; the paper's 0.0153 for summed losses and its units of learning rate


def get_config(dataset: str = "cifar10") -> ConfigDict:
    config = default.get_config(dataset)
    config.model.name = "airbench94"
    if config.augment.crop_padding:
        config.augment.crop_padding = 2
    if config.augment.flip == "random":
        config.augment.flip = "alternating"
    config.test_time_flip = config.augment.flip != "none"
    config.test_time_shift = 1
    config.batch_size = 1024
    # The paper has 9.9 epochs of 50,000 images.
    config.num_epochs = 14.0
    config.data.val_fraction = 0.02
    config.eval_every_epochs = 3.5
    config.label_smoothing = 0.2
    config.optimizer.learning_rate = 1.5
    config.optimizer.momentum = 0.85
    config.optimizer.weight_decay = DECAY
    config.optimizer.lookahead_steps = 5
    config.optimizer.lookahead_rate = 1.0
    config.optimizer.lookahead_final_rate = 0.23
    config.optimizer.rules = (
        ("^whiten/kernel|/scale$", {"frozen": True}),
        ("^bn.*/bias$", {"lr": 64.0, "weight_decay": DECAY / 64}),
    )
    config.schedule.name = "linear"
    config.schedule.warmup_epochs = 2.8
    config.schedule.final_factor = 0.07
    return config
