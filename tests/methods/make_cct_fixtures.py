"""Writes fixtures/cct.json: results of the authors' functions on `reference_arrays`.

    python tests/methods/make_cct_fixtures.py FOLDER

FOLDER is a checkout of github.com/yassouali/CCT at the commit below. It needs torch (2.14 was
used) and NumPy. All arrays are float64, in PyTorch's order of dimensions inside, in ours in the
file.
"""

import json
import pathlib
import sys
import types
from unittest import mock

import numpy as np
import reference_arrays as arrays
import torch

COMMIT = "65d4e5bd4501ae3c564493d0ce18924a908639f5"


def first_channels(x):
    return torch.tensor(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def last_channels(x):
    return np.moveaxis(x.detach().numpy(), 1, -1).tolist()


def authors_code(folder):
    """The module models/decoders.py, and the loss of utils/losses.py without the rest of the file.

    OpenCV finds contours, which are not computed here; Python 3 does not parse all of losses.py.
    """
    helpers = types.ModuleType("utils.helpers")
    helpers.initialize_weights = None
    sys.modules |= {"cv2": types.ModuleType("cv2"), "utils.helpers": helpers}
    sys.modules["utils"] = types.ModuleType("utils")
    sys.path.insert(0, str(folder / "models"))
    import decoders

    text = (folder / "utils" / "losses.py").read_text()
    losses = types.ModuleType("losses")
    losses.F = torch.nn.functional
    exec(text[text.index("def softmax_mse_loss") : text.index("def softmax_kl_loss")], vars(losses))
    return decoders, losses


def decoder(decoders):
    network = decoders.upsample(3, 2, 8).double()
    kernels = [network[0].weight] + [network[i].conv.weight for i in (1, 2, 3)]
    with torch.no_grad():
        for kernel, values in zip(kernels, arrays.DECODER_KERNELS, strict=True):
            kernel.copy_(torch.tensor(values.T[..., None, None]))
        for i, values in enumerate(arrays.DECODER_BIASES):
            network[i + 1].conv.bias.copy_(torch.tensor(values))
    return network


def main(folder):
    decoders, losses = authors_code(pathlib.Path(folder))
    network, x = decoder(decoders), first_channels(arrays.FEATURES)
    results = {"decoder": last_channels(network(x)), "vat": {}}
    for xi, eps, iterations in ((1e-6, 2.0, 1), (1e-6, 2.0, 2), (0.1, 10.0, 1)):
        start = first_channels(arrays.START) + 0.5
        with mock.patch.object(torch, "rand", lambda shape, start=start: start.clone()):
            r_adv = decoders.get_r_adv(x, network, iterations, xi, eps)
        results["vat"][f"{xi} {eps} {iterations}"] = last_channels(r_adv)
    with mock.patch.object(decoders.np.random, "uniform", lambda low, high: 0.8):
        dropped = decoders.FeatureDropDecoder.feature_dropout(None, x)
    results["feature_drop"] = last_channels(dropped)
    main_logits = first_channels(arrays.MAIN_LOGITS)
    for name, context in (("context_mask", True), ("object_mask", False)):
        masked = decoders.guided_masking(x, main_logits, 8, (3, 2), context)
        results[name] = last_channels(masked)
    target = torch.softmax(main_logits, dim=1)
    results["consistency"] = [
        losses.softmax_mse_loss(first_channels(logits).requires_grad_(), target).item()
        for logits in arrays.AUXILIARY_LOGITS
    ]
    origin = {
        "repository": "github.com/yassouali/CCT",
        "commit": COMMIT,
        "files": ["models/decoders.py", "utils/losses.py"],
    }
    path = pathlib.Path(__file__).parent / "fixtures" / "cct.json"
    path.write_text(json.dumps({"origin": origin, **results}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
