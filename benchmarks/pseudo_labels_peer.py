"""The worker of `pseudo_labels.py`: the same labelling in PyTorch, in its own environment.

    python pseudo_labels_peer.py FOLDER THREADS

FOLDER contains BACKBONE.npz, parameters under our names, and BATCH.npz with uint8 `images`
[n, h, w, 3]. The worker prints one line of JSON with its version, then answers each line
{"backbone", "batch", "scales", "save"} with {"seconds", "cpu_seconds"}. If "save" is a path, it
writes the class ids [n, h, w] there.
"""

import json
import pathlib
import sys
import time

import numpy as np
import torch
from torch.nn import functional
from train_step_peer import DeepLabV3Plus, load, resize


class Labeler:
    """Labels one batch with a network in inference mode."""

    def __init__(self, folder, backbone, batch):
        weights = np.load(folder / f"{backbone}.npz")
        self.model = DeepLabV3Plus(backbone, len(weights["classifier.bias"]))
        load(self.model, weights)
        self.model.to(memory_format=torch.channels_last).eval()
        # A view in channels_last.
        self.images = torch.from_numpy(np.load(folder / f"{batch}.npz")["images"])
        self.images = self.images.permute(0, 3, 1, 2)

    @torch.inference_mode()
    def label(self, scales):
        """Returns uint8 class ids [n, h, w], from softmax averaged over scales and mirroring."""
        size, total = self.images.shape[2:], 0
        images = self.model.normalize(self.images)
        for scale in scales:
            x = resize(images, [round(scale * side) for side in size])
            # Original and mirror image in one pass, as in our predictor.
            logits = self.model.logits(torch.cat([x, x.flip(3)]))
            plain, mirrored = functional.softmax(resize(logits, size), 1).chunk(2)
            total = total + plain + mirrored.flip(3)
        return total.argmax(1).to(torch.uint8)


def main(folder, threads):
    """Answers requests until its input ends."""
    torch.set_num_threads(int(threads))
    labelers = {}
    print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads()}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            case = request["backbone"], request["batch"]
            if case not in labelers:
                labelers[case] = Labeler(pathlib.Path(folder), *case)
            wall, cpu = time.perf_counter(), time.process_time()
            classes = labelers[case].label(request["scales"])
            answer = {
                "seconds": time.perf_counter() - wall,
                "cpu_seconds": time.process_time() - cpu,
            }
            if request["save"]:
                np.save(request["save"], classes.numpy())
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
