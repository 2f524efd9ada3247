"""Trains a classic CNN:

    python main.py                                              LeNet-5 on scikit-learn's digits
    python main.py --config=configs/resnet34.py                 on CIFAR-10
    python main.py --config=configs/resnet34.py:images_set --config.data.dir=photos
    python main.py --config=configs/lenet5.py --config.optimizer.name=nadam --workdir=./run

This file stays short: it turns flags into a call of `classic_cnns.train_and_evaluate`.
"""

from absl import app, flags

from classic_cnns import commandline

flags.DEFINE_string(
    "workdir", None, "Directory of the run; a run in it is continued. Default: a new one in runs/."
)
flags.DEFINE_bool("debug", False, "Show the traceback of an error.")
commandline.define_config()


def main(argv: list[str]) -> None:
    commandline.train(argv, flags.FLAGS)


if __name__ == "__main__":
    app.run(main, flags_parser=commandline.parse)
