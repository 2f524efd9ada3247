"""Trains a classic CNN:

    python main.py                                              LeNet-5 on scikit-learn's digits
    python main.py --config=configs/resnet34.py                 on CIFAR-10
    python main.py --config=configs/resnet34.py:images_set --config.data.dir=photos
    python main.py --config=configs/lenet5.py --config.optimizer.name=nadam --workdir=./run

This file stays short: it turns flags into a call of `classic_cnns.train_and_evaluate`.
"""

from classic_cnns.large_pages import restart_with_large_pages
from classic_cnns.signals import leave_on_interrupt

if __name__ == "__main__":
    leave_on_interrupt()
    restart_with_large_pages()
    from classic_cnns import commandline

    commandline.main(__doc__)
