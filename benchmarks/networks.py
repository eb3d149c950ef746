"""Networks of the benchmarks, most of them from papers."""

import keras
from keras import layers


def lenet_300_100():
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Flatten(),
            layers.Dense(300, "relu"),
            layers.Dense(100, "relu"),
            layers.Dense(10, "softmax"),
        ],
        name="lenet-300-100",
    )


def lenet_5_caffe():
    """Return the LeNet-5 of the DST paper, which has 431,080 weights."""
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(20, 5, activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(50, 5, activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(500, "relu"),
            layers.Dense(10, "softmax"),
        ],
        name="lenet-5-caffe",
    )


def lenet_5():
    """Return the LeNet-5 of 1998, but with ReLU and max pooling. The network has 61,706 weights."""
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(6, 5, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(16, 5, activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(120, "relu"),
            layers.Dense(84, "relu"),
            layers.Dense(10, "softmax"),
        ],
        name="lenet-5",
    )


def lstm(units: int):
    """Return an LSTM network that reads an image row by row."""
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Reshape((28, 28)),
            layers.LSTM(units),
            layers.Dense(10, "softmax"),
        ],
        name=f"lstm-{units}",
    )


def resnet(depth: int, width: int = 16, stride: int = 1):
    """Return the CIFAR-10 ResNet of arXiv 1512.03385 with 6 n + 2 layers and projection shortcuts.

    `width` is the number of channels of the first stage. `stride` is the stride of the first
    convolution. The default width and the default stride are the values of the paper.
    """
    blocks, rest = divmod(depth - 2, 6)
    if rest:
        raise ValueError(f"depth must be 6 n + 2. Received: {depth}")

    def convolved(x, filters, size, strides):
        x = layers.Conv2D(filters, size, strides, padding="same", use_bias=False)(x)
        return layers.BatchNormalization(momentum=0.9, epsilon=1e-5)(x)

    inputs = keras.Input((32, 32, 3))
    x = layers.ReLU()(convolved(inputs, width, 3, stride))
    for filters in (width, 2 * width, 4 * width):
        for block in range(blocks):
            strides = 2 if filters > width and block == 0 else 1
            y = layers.ReLU()(convolved(x, filters, 3, strides))
            y = convolved(y, filters, 3, 1)
            if strides > 1:
                x = convolved(x, filters, 1, strides)
            x = layers.ReLU()(layers.Add()([x, y]))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(10, "softmax")(x), name=f"resnet-{depth}")


def keyword_cnn():
    """Return a small convolutional network for spectrograms of spoken digits, of size 63 x 32."""
    inputs = x = keras.Input((63, 32, 1))
    for filters in (32, 64, 64):
        x = layers.Conv2D(filters, 3, 2, padding="same", use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))
    x = layers.Dense(128, "relu")(layers.Flatten()(x))
    return keras.Model(inputs, layers.Dense(10, "softmax")(x), name="keyword-cnn")


def ds_cnn(width: int = 64):
    """Return a CNN with depthwise separable convolutions (arXiv 1711.07128) for CIFAR-10."""

    def normalized(x):
        return layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))

    inputs = keras.Input((32, 32, 3))
    x = normalized(layers.Conv2D(width, 3, 2, padding="same", use_bias=False)(inputs))
    for number, (factor, strides) in enumerate(((1, 1), (2, 2), (2, 1), (4, 2), (4, 1))):
        x = layers.DepthwiseConv2D(3, strides, padding="same", use_bias=False)(x)
        x = normalized(x)
        pointwise = layers.Conv2D(factor * width, 1, use_bias=False, name=f"pointwise{number}")
        x = normalized(pointwise(x))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(10, "softmax")(x), name="ds-cnn")


def vgg():
    """Return VGG A (arXiv 1409.1556) for CIFAR-10, with batch normalization and one dense layer."""
    model = keras.Sequential([keras.Input((32, 32, 3))], name="vgg")
    for widths in ((64,), (128,), (256, 256), (512, 512), (512, 512)):
        for width in widths:
            model.add(layers.Conv2D(width, 3, padding="same", use_bias=False))
            model.add(layers.BatchNormalization(momentum=0.9))
            model.add(layers.ReLU())
        model.add(layers.MaxPooling2D())
    model.add(layers.Flatten())
    model.add(layers.Dense(10, "softmax"))
    return model


def mobilenet(size: int = 96, width: float = 0.5):
    """Return MobileNetV1 (arXiv 1704.04861) with padding that XNNPACK's sparse kernels support."""

    def channels(n):
        return int(n * width)

    def halved(x):
        return layers.ZeroPadding2D(1)(x), {"strides": 2, "padding": "valid"}

    def normalized(x):
        return layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))

    inputs = keras.Input((size, size, 3))
    x, options = halved(inputs)
    x = normalized(layers.Conv2D(channels(32), 3, use_bias=False, **options)(x))
    for number, filters in enumerate((64, 128, 128, 256, 256, *[512] * 6, 1024, 1024)):
        options = {"padding": "same"}
        if number in (1, 3, 5, 11):
            x, options = halved(x)
        x = normalized(layers.DepthwiseConv2D(3, use_bias=False, **options)(x))
        pointwise = layers.Conv2D(channels(filters), 1, use_bias=False, name=f"pointwise{number}")
        x = normalized(pointwise(x))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(10, "softmax")(x), name="mobilenet")


def vision_transformer(
    blocks: int = 6, width: int = 192, heads: int = 6, size: int = 32, patch: int = 4
):
    """Return a vision transformer (arXiv 2010.11929) with mean pooling and square patches."""
    inputs = keras.Input((size, size, 3))
    x = layers.Conv2D(width, patch, strides=patch)(inputs)
    x = layers.Reshape(((size // patch) ** 2, width))(x)
    for _ in range(blocks):
        y = layers.LayerNormalization()(x)
        x = layers.Add()([x, layers.MultiHeadAttention(heads, width // heads)(y, y)])
        y = layers.Dense(4 * width, "gelu")(layers.LayerNormalization()(x))
        x = layers.Add()([x, layers.Dense(width)(y)])
    x = layers.GlobalAveragePooling1D()(layers.LayerNormalization()(x))
    return keras.Model(inputs, layers.Dense(10)(x), name="vit")


def u_net(width: int = 32, depth: int = 3):
    """Return a U-Net (arXiv 1505.04597) with batch normalization and transposed convolutions."""

    def block(x, filters):
        for _ in range(2):
            x = layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
            x = layers.ReLU()(layers.BatchNormalization()(x))
        return x

    inputs = x = keras.Input((32, 32, 3))
    skipped = []
    for level in range(depth):
        skipped.append(block(x, width * 2**level))
        x = layers.MaxPooling2D()(skipped[-1])
    x = block(x, width * 2**depth)
    for level in reversed(range(depth)):
        x = layers.Conv2DTranspose(width * 2**level, 2, strides=2)(x)
        x = block(layers.Concatenate()([skipped[level], x]), width * 2**level)
    return keras.Model(inputs, layers.Conv2D(2, 1)(x), name="u-net")


def detector(width: int = 32):
    """Return a residual network with a feature pyramid of two levels, and three heads per level."""

    def convolved(x, filters, strides=1):
        x = layers.Conv2D(filters, 3, strides, padding="same", use_bias=False)(x)
        return layers.BatchNormalization()(x)

    inputs = keras.Input((64, 64, 3))
    x = layers.ReLU()(convolved(inputs, width, 2))
    levels = []
    for filters in (2 * width, 4 * width):
        x = layers.ReLU()(convolved(x, filters, 2))
        y = convolved(layers.ReLU()(convolved(x, filters)), filters)
        x = layers.ReLU()(layers.Add()([x, y]))
        levels.append(layers.Conv2D(2 * width, 1)(x))
    fine = layers.Add()([levels[0], layers.UpSampling2D()(levels[1])])
    outputs = {}
    for name, level in (("fine", fine), ("coarse", levels[1])):
        y = layers.ReLU()(convolved(level, 2 * width))
        for head, filters in (("classes", 10), ("boxes", 4), ("center", 1)):
            outputs[f"{name}_{head}"] = layers.Conv2D(filters, 3, padding="same")(y)
    return keras.Model(inputs, outputs, name="detector")
