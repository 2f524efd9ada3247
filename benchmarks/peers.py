"""The same networks as anyone would write them with flax.linen, for comparison."""

import flax.linen as nn


class PlainLeNet5(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        for features in (6, 16):
            x = nn.relu(nn.Conv(features, (5, 5), padding="VALID")(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(len(x), -1)
        for features in (120, 84):
            x = nn.relu(nn.Dense(features)(x))
        return nn.Dense(10)(x)


class PlainBlock(nn.Module):
    features: int
    stride: int

    @nn.compact
    def __call__(self, x, train):
        def norm(x):
            return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5)(x)

        def conv(x, kernel, stride):
            pad = [(kernel // 2,) * 2] * 2
            return nn.Conv(self.features, (kernel,) * 2, (stride,) * 2, pad, use_bias=False)(x)

        y = nn.relu(norm(conv(x, 3, self.stride)))
        y = norm(conv(y, 3, 1))
        if x.shape != y.shape:
            x = norm(conv(x, 1, self.stride))
        return nn.relu(x + y)


class PlainResNet18(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(64, (3, 3), padding=[(1, 1)] * 2, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5)(x))
        for i in range(4):
            for j in range(2):
                x = PlainBlock(64 * 2**i, 2 if i and not j else 1)(x, train)
        return nn.Dense(10)(x.mean((1, 2)))
