"""LeNet-5 and ResNet-18 as anyone would write them with Keras 3; the backend is JAX."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np
from keras import layers

NETWORKS = ("lenet5", "resnet18")


def lenet5(x, classes):
    for features in (6, 16):
        x = layers.MaxPooling2D()(layers.Conv2D(features, 5, activation="relu")(x))
    x = layers.Flatten()(x)
    for features in (120, 84):
        x = layers.Dense(features, activation="relu")(x)
    return layers.Dense(classes)(x)


def resnet18(x, classes):
    def unit(x, features, kernel, stride):
        # "same" pads an even map unevenly at stride 2: other pixels, the same work.
        x = layers.Conv2D(features, kernel, stride, "same", use_bias=False)(x)
        return layers.BatchNormalization(momentum=0.9, epsilon=1e-5)(x)

    x = layers.ReLU()(unit(x, 64, 3, 1))
    for i in range(4):
        for j in range(2):
            features, stride = 64 * 2**i, 2 if i and not j else 1
            y = layers.ReLU()(unit(x, features, 3, stride))
            y = unit(y, features, 3, 1)
            if stride > 1:
                x = unit(x, features, 1, stride)
            x = layers.ReLU()(layers.Add()([x, y]))
    return layers.Dense(classes)(layers.GlobalAveragePooling2D()(x))


def keras_model(name, classes, shape, before=()):
    """A compiled network, behind the layers of `before`, and its number of parameters."""
    x = inputs = keras.Input(shape)
    for layer in before:
        x = layer(x)
    model = keras.Model(inputs, {"lenet5": lenet5, "resnet18": resnet18}[name](x, classes))
    model.compile(
        keras.optimizers.SGD(0.01, momentum=0.9, nesterov=True),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model, sum(int(np.prod(w.shape)) for w in model.trainable_variables)


def keras_runner(name, classes, images, labels):
    """A function of the number of steps through `train_on_batch`, and the number of parameters."""
    model, count = keras_model(name, classes, images.shape[1:])

    def run(steps):
        for _ in range(steps):
            model.train_on_batch(images, labels)

    return run, count
