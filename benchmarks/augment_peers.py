"""The worker of `augment.py`: times a peer's augmentations, in the peer's own environment.

    python augment_peers.py PEER FOLDER

FOLDER contains SIZE.npy, uint8 [count, SIZE, SIZE, 3]. The worker prints one line of JSON with the
cases that it supports, then answers each line {"case", "size", "count"} with {"ms": milliseconds
per image}, until its input ends. It imports only the peer, NumPy and the standard library.
"""

import json
import pathlib
import sys
import time

# The operations that albumentations has too, of equal or nearly equal meaning.
COMMON = (
    *("contrast_gamma", "brightness", "equalize", "hsv", "invert_channel", "blur", "noise_gau"),
    *("channel_shuffle", "dropout", "multiply", "salt_pepper", "solarize", "jpeg_compression"),
)
# Three random operations: of the whole pool, and of `COMMON`.
PIPELINES = ("N=3", "N=3 common")


def imgaug_cases():
    """Returns all operations; the released code of the method uses imgaug."""
    import cv2
    import numpy as np

    np.bool = np.bool_  # imgaug 0.4.0 uses this name, which NumPy removed in 1.24
    import imgaug.augmenters as iaa

    cv2.setNumThreads(1)
    each = {"per_channel": True}
    operations = {
        "contrast_gamma": iaa.GammaContrast((0.5, 1.5), **each),
        "contrast_linear": iaa.LinearContrast((0.5, 2.0), **each),
        "brightness": iaa.Add((-20, 50)),
        "brightness_channel": iaa.Add((-20, 50), **each),
        "equalize": iaa.pillike.Equalize(),
        "hsv": iaa.AddToHueAndSaturation((-20, 20), **each),
        "invert_channel": iaa.Invert(0.5, **each),
        "blur": iaa.GaussianBlur((0.5, 2.0)),
        "noise_gau": iaa.AdditiveGaussianNoise(scale=(7.65, 20.4), **each),
        "noise_pos": iaa.AdditivePoissonNoise((10, 15), **each),
        "channel_shuffle": iaa.ChannelShuffle(1.0),
        "dropout": iaa.Dropout((0.05, 0.5), **each),
        "coarse_dropout": iaa.CoarseDropout((0.05, 0.2), size_px=(4, 16), **each),
        "multiply": iaa.Multiply((0.25, 2.5), **each),
        "salt_pepper": iaa.SaltAndPepper((0.0, 0.1), **each),
        "solarize": iaa.Solarize(1.0, threshold=(64, 192)),
        # imgaug's parameter is the compression, 100 - quality.
        "jpeg_compression": iaa.JpegCompression((40, 93)),
    }
    pools = (operations.values(), [operations[name] for name in COMMON])
    pipelines = [iaa.SomeOf(3, list(pool), random_order=True) for pool in pools]
    cases = {**operations, **dict(zip(PIPELINES, pipelines, strict=True))}
    return {name: _timed(case, "image") for name, case in cases.items()}


def albumentations_cases():
    """Returns operations of equal or nearly equal meaning; comments mark those that do less."""
    import albumentations as alb
    import cv2

    cv2.setNumThreads(1)
    always = {"p": 1.0}
    operations = {
        # One gamma for all channels.
        "contrast_gamma": alb.RandomGamma(gamma_limit=(50, 150), **always),
        "brightness": alb.RandomBrightnessContrast(
            brightness_limit=(-20 / 255, 50 / 255), contrast_limit=(0, 0), **always
        ),
        "equalize": alb.Equalize(mode="pil", by_channels=True, **always),
        "hsv": alb.HueSaturationValue(20, 20, 0, **always),
        # Always all channels.
        "invert_channel": alb.InvertImg(**always),
        "blur": alb.GaussianBlur(blur_limit=0, sigma_limit=(0.5, 2.0), **always),
        "noise_gau": alb.GaussNoise(
            std_range=(7.65 / 255, 20.4 / 255), per_channel=True, noise_scale_factor=1, **always
        ),
        "channel_shuffle": alb.ChannelShuffle(**always),
        # One probability, because it takes no range.
        "dropout": alb.PixelDropout(dropout_prob=0.275, per_channel=True, **always),
        "multiply": alb.MultiplicativeNoise(
            multiplier=(0.25, 2.5), per_channel=True, elementwise=False, **always
        ),
        # Black and white only, the same in all channels of a pixel.
        "salt_pepper": alb.SaltAndPepper(amount=(0.001, 0.1), **always),
        "solarize": alb.Solarize(threshold_range=(64 / 255, 192 / 255), **always),
        "jpeg_compression": alb.ImageCompression(quality_range=(7, 60), **always),
    }
    assert tuple(operations) == COMMON
    cases = {**operations, PIPELINES[1]: alb.SomeOf(list(operations.values()), n=3, **always)}
    return {
        name: _timed(lambda image, case=case: case(image=image)["image"])
        for name, case in cases.items()
    }


def torchvision_cases():
    """Returns operations of equal meaning, on uint8 tensors [3, H, W] made before the timing."""
    import numpy as np
    import torch
    from torchvision.transforms import v2

    torch.set_num_threads(1)

    def gaussian_noise(image):
        sigma = np.random.uniform(7.65, 20.4) / 255
        return v2.functional.gaussian_noise(image, 0.0, sigma)

    def gaussian_blur(image):
        sigma = np.random.uniform(0.5, 2)
        return v2.functional.gaussian_blur(image, 2 * int(np.ceil(3 * sigma)) + 1, sigma)

    operations = {
        # One gamma for all channels.
        "contrast_gamma": lambda x: v2.functional.adjust_gamma(x, np.random.uniform(0.5, 1.5)),
        "equalize": v2.functional.equalize,
        # Always all channels.
        "invert_channel": v2.functional.invert,
        "blur": gaussian_blur,
        "noise_gau": gaussian_noise,
        "channel_shuffle": v2.RandomChannelPermutation(),
        "solarize": lambda x: v2.functional.solarize(x, np.random.uniform(64, 192)),
        "jpeg_compression": v2.JPEG((7, 60)),
    }

    def prepared(image):
        return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))

    return {name: _timed(case, prepare=prepared) for name, case in operations.items()}


def _timed(operation, keyword=None, prepare=None):
    """Returns a function images -> CPU seconds per image, each image augmented once."""

    def run(images):
        images = [prepare(image) if prepare else image for image in images]
        start = time.process_time()
        for image in images:
            operation(**{keyword: image}) if keyword else operation(image)
        return (time.process_time() - start) / len(images)

    return run


def main(peer: str, folder: str) -> None:
    """Answers requests until its input ends."""
    import numpy as np

    cases = {
        "imgaug": imgaug_cases,
        "albumentations": albumentations_cases,
        "torchvision": torchvision_cases,
    }[peer]()
    print(json.dumps({"cases": list(cases)}), flush=True)
    images: dict = {}
    turn = 0
    for line in sys.stdin:
        request = json.loads(line)
        size = request["size"]
        if size not in images:
            images[size] = np.load(pathlib.Path(folder) / f"{size}.npy")
        # Copies, because an operation of the peer may change its input in place.
        chosen = [
            images[size][(turn + i) % len(images[size])].copy() for i in range(request["count"])
        ]
        turn += request["count"]
        try:
            answer = {"ms": 1000 * cases[request["case"]](chosen)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
