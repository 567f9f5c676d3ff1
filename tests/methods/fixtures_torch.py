"""The fixtures of code in PyTorch; see `make_fixtures.py`."""

import random
import sys
import types
from unittest import mock

import arrays
import numpy as np
import torch

torch.Tensor.cuda = lambda self, *args, **kwargs: self
# Packages that the published files import, and that the functions used here do not need.
for missing in (
    *("scipy", "scipy.stats", "scipy.ndimage", "scipy.special", "kornia"),
    *("scipy.ndimage.interpolation", "scipy.ndimage.filters", "cv2"),
):
    if missing not in sys.modules:
        sys.modules[missing] = types.ModuleType(missing)
        for name in ("gaussian_filter", "map_coordinates", "erfinv"):
            setattr(sys.modules[missing], name, None)


def channels_first(array, grad=False):
    """A tensor [n, c, h, w] of an array [n, h, w, c]."""
    tensor = torch.tensor(np.moveaxis(array, -1, 1).copy())
    return tensor.requires_grad_(grad)


def channels_last(tensor):
    return tensor.detach().movedim(1, -1).tolist()


def sample(tensor):
    """Every 41st value of a tensor [n, c, h, w], in the order [n, h, w, c]."""
    return tensor.detach().movedim(1, -1).ravel()[::41].tolist()


def french2019(repository):
    boxes = {}
    mask_gen = repository.module("mask_gen.py")
    generator = mask_gen.BoxMaskGenerator(0.5, invert=True)
    for index, size in enumerate(arrays.BOX_SIZES):
        rng = np.random.RandomState(index)
        masks = generator.generate_params(arrays.BOXES_PER_SIZE, size, rng)[:, 0] > 0
        boxes["x".join(map(str, size))] = [edges(mask) for mask in masks]
    file = "train_seg_semisup_mask_mt.py"
    student = channels_first(arrays.logits(3), grad=True)
    scope = {
        "torch": torch,
        "F": torch.nn.functional,
        "batch_ux0_tea": channels_first(arrays.logits(1)),
        "batch_ux1_tea": channels_first(arrays.logits(2)),
        "batch_ux0_stu": channels_first(arrays.images(1)),
        "batch_ux1_stu": channels_first(arrays.images(2)),
        "batch_um0": torch.tensor(arrays.valid_pixels(1))[:, None].double(),
        "batch_um1": torch.tensor(arrays.valid_pixels(2))[:, None].double(),
        "batch_mix_masks": torch.tensor(arrays.masks(1))[:, None].double(),
        "teacher_net": lambda x: x,
        "student_net": lambda x: student,
        "conf_thresh": arrays.THRESHOLD,
        "conf_rate_acc": 0.0,
        "conf_per_pixel": False,
        "rampup": -1,
        "cons_loss_fn": "var",
    }
    repository.run(file, "batch_ux_stu_mixed =", "loss_mask = batch_um_mixed", scope)
    repository.run(file, "if conf_thresh > 0.0", "loss_mask = loss_mask * conf_mask", scope)
    scope["ramp_val"] = 1.0
    repository.run(file, "# Compute per-pixel", "consistency_loss.sum(dim=1, keepdim=True)", scope)
    repository.run(file, "consistency_loss = (consistency_loss * loss_mask)", ".mean()", scope)
    scope["consistency_loss"].backward()
    return {
        "boxes": boxes,
        "mixed_image": sample(scope["batch_ux_stu_mixed"]),
        "share": float(scope["conf_mask"]),
        "loss": float(scope["consistency_loss"]),
        "gradient": sample(student.grad),
        "average": french_average(repository),
    }


def edges(mask):
    """(top, left, bottom, right) of a box."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [int(v) for v in (rows[0], columns[0], rows[-1] + 1, columns[-1] + 1)]


def network(values):
    """A network with a weight and a running mean, float32."""
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.tensor(values["weight"], dtype=torch.float32))
    module.register_buffer("mean", torch.tensor(values["mean"], dtype=torch.float32))
    return module


def set_values(module, seed):
    with torch.no_grad():
        for name, value in arrays.network_values(seed).items():
            getattr(module, name).copy_(torch.tensor(value))


def averaged(module):
    return {name: value.tolist() for name, value in module.state_dict().items()}


def french_average(repository):
    student, teacher = (network(arrays.network_values(0)) for _ in range(2))
    for parameter in teacher.parameters():
        parameter.requires_grad = False
    update = repository.module("optim_weight_ema.py").EMAWeightOptimizer(teacher, student, 0.99)
    for seed in range(1, 6):
        set_values(student, seed)
        with torch.no_grad():
            update.step()
    return averaged(teacher)


def classmix(repository):
    transformmasks = repository.module("utils/transformmasks.py")
    transformsgpu = repository.module("utils/transformsgpu.py")
    loss = repository.module("utils/loss.py")
    file = "trainSSL.py"
    np.random.seed(5)
    scope = {
        "torch": torch,
        "np": np,
        "transformmasks": transformmasks,
        "argmax_u_w": torch.tensor(arrays.teacher_classes()),
        "batch_size": arrays.IMAGES,
        "ignore_label": 250,
    }
    repository.run(
        file, "for image_i in range", "MixMask = torch.cat((MixMask,transformmasks.gen", scope
    )
    classes = scope["MixMask"]
    labels = arrays.teacher_classes()
    chosen = [sorted({int(v) for v in labels[i][classes[i] > 0]}) for i in range(arrays.IMAGES)]
    mask = torch.tensor(arrays.masks(1)).double()
    softmax = torch.softmax(channels_first(arrays.logits(1)), dim=1)
    image, _ = transformsgpu.mix(mask, data=channels_first(arrays.images(1)))
    mixed, _ = transformsgpu.mix(mask, data=softmax)
    confidence, label = torch.max(mixed, dim=1)
    student = channels_first(arrays.logits(3), grad=True)
    scope |= {
        **{"max_probs": confidence, "pseudo_label": label, "logits_u_s": student},
        "consistency_weight": 1,
        "unlabeled_loss": loss.CrossEntropyLoss2dPixelWiseWeighted(),
    }
    repository.run(file, "unlabeled_weight = torch.sum", "pixelWiseWeight = unlabeled", scope)
    repository.run(
        file, "L_u = consistency_weight * unl", "unlabeled_loss(logits_u_s, pseudo_l", scope
    )
    scope["L_u"].backward()
    update = repository.function(file, "update_ema_variables", {"gpus": [0]})
    model, average = (network(arrays.network_values(0)) for _ in range(2))
    for seed in range(1, 6):
        set_values(model, seed)
        update(average, model, 0.7, seed - 1)
    return {
        "chosen_classes": chosen,
        "mask_pixels": [int(v) for v in classes.sum((1, 2))],
        "mixed_image": sample(image),
        "mixed_label": label.ravel()[::41].tolist(),
        # The fixture's threshold is the paper's, .968, which stands in the script.
        "share": scope["unlabeled_weight"],
        "loss": float(scope["L_u"]),
        "gradient": sample(student.grad),
        "average": averaged(average),
    }


def unlabeled_scope(repository):
    """What the loss of UniMatch, FixMatch and UniMatch V2 is computed from."""
    ignore = [
        torch.tensor(np.where(arrays.valid_pixels(seed), 0, arrays.IGNORE)).long()
        for seed in (1, 2)
    ]
    names = ("pred_x", "pred_u_s1", "pred_u_s2", "pred_u_w_fp", "pred_u_w")
    return {
        "torch": torch,
        "criterion_l": torch.nn.CrossEntropyLoss(ignore_index=arrays.IGNORE),
        "criterion_u": torch.nn.CrossEntropyLoss(reduction="none"),
        "cfg": {"conf_thresh": arrays.THRESHOLD},
        **{"ignore_mask": ignore[0], "ignore_mask_mix": ignore[1]},
        "mask_x": torch.tensor(arrays.labels(7)).long(),
        **{
            f"cutmix_box{suffix}": torch.tensor(arrays.masks(seed)).float()
            for suffix, seed in (("", 1), ("1", 1), ("2", 2))
        },
        **{
            f"img_u_{view}": channels_first(arrays.images(seed))
            for view, seed in (
                ("s", 1),
                ("s_mix", 2),
                ("s1", 1),
                ("s1_mix", 2),
                ("s2", 3),
                ("s2_mix", 4),
            )
        },
        **{name: channels_first(arrays.logits(3 + i), grad=True) for i, name in enumerate(names)},
        "pred_u_s": channels_first(arrays.logits(4), grad=True),
        "img_u_w_mix": channels_first(arrays.logits(2)),
        "model": lambda x: x,
    }


def gradients(scope):
    """Backward, and a sample of the gradient of each prediction; None without one."""
    names = ("pred_x", "pred_u_s", "pred_u_s1", "pred_u_s2", "pred_u_w_fp")
    tensors = {name: scope[name] for name in names}
    scope["loss"].backward()
    return {name: sample(t.grad) for name, t in tensors.items() if t.grad is not None}


def unimatch(repository):
    transform = repository.module("dataset/transform.py")
    random.seed(0)
    np.random.seed(0)
    boxes = [transform.obtain_cutmix_box(arrays.UNIMATCH_SIZE) for _ in range(20000)]
    found = np.array([edges(box.numpy() > 0) for box in boxes if box.any()], float)
    top, left, bottom, right = found.T
    height, width = bottom - top, right - left
    values = {"height": height, "width": width, "top": top, "left": left}
    values |= {"area": height * width, "ratio": height / width}
    quantiles = {name: np.quantile(v, arrays.QUANTILES).tolist() for name, v in values.items()}

    scope = unlabeled_scope(repository)
    file = "unimatch.py"
    repository.run(file, "pred_u_w_mix = model(", "mask_u_w_mix = pred_u_w_mix", scope)
    repository.run(file, "img_u_s1[cutmix_box1", "img_u_s2_mix[cutmix_box2", scope)
    repository.run(file, "pred_u_w = pred_u_w.detach()", "loss = (loss_x +", scope)
    losses = ("loss", "loss_x", "loss_u_s1", "loss_u_s2", "loss_u_w_fp")
    result = {
        "boxes": {"share": len(found) / len(boxes), "quantiles": quantiles},
        "mixed_image": sample(scope["img_u_s2"]),
        "mixed_label": scope["mask_u_w_cutmixed2"].ravel()[::41].tolist(),
        **{name: float(scope[name]) for name in losses},
        "gradients": gradients(scope),
    }

    scope = unlabeled_scope(repository)
    file = "fixmatch.py"
    repository.run(file, "pred_u_w_mix = model(", "mask_u_w_mix = pred_u_w_mix", scope)
    repository.run(file, "pred_u_w = pred_u_w.detach()", "loss = (loss_x +", scope)
    result["fixmatch"] = {name: float(scope[name]) for name in ("loss", "loss_x", "loss_u_s")}

    result["ohem"] = ohem(repository)
    return result


def ohem(repository):
    """Loss and gradient where the k-th smallest probability is above and below the threshold."""
    make = repository.module("util/ohem.py").ProbOhemCrossEntropy2d
    target = torch.tensor(arrays.labels(7)).long()
    pixels = int((target != arrays.IGNORE).sum())
    cases = []
    for share in (0.25, 0.9):
        kept = round(share * pixels)
        logits = channels_first(arrays.logits(3), grad=True)
        loss = make(arrays.IGNORE, thresh=0.7, min_kept=kept)(logits, target)
        loss.backward()
        cases.append({"share": share, "loss": float(loss), "gradient": sample(logits.grad)})
    return cases


def unimatch_v2(repository):
    scope = unlabeled_scope(repository)
    file = "unimatch_v2.py"
    repository.run(file, "conf_u_w = pred_u_w.softmax", "mask_u_w = pred_u_w.argmax", scope)
    repository.run(file, "img_u_s1[cutmix_box1", "img_u_s2[cutmix_box2", scope)
    repository.run(file, "mask_u_w_cutmixed1, conf_u_w", "loss = (loss_x +", scope)
    result = {
        "mixed_image": sample(scope["img_u_s2"]),
        "mixed_label": scope["mask_u_w_cutmixed2"].ravel()[::41].tolist(),
        **{name: float(scope[name]) for name in ("loss", "loss_x", "loss_u_s1", "loss_u_s2")},
        "gradients": gradients(scope),
    }
    model, model_ema = (network(arrays.network_values(0)) for _ in range(2))
    for parameter in model_ema.parameters():
        parameter.requires_grad = False
    for iters in range(600):
        set_values(model, 1 + iters % 7)
        scope = {"model": model, "model_ema": model_ema, "iters": iters}
        repository.run(file, "ema_ratio = min(", "buffer_ema.copy_(", scope)
    result["average"] = averaged(model_ema)
    result["spared_pairs"] = {pairs: spared(repository, pairs) for pairs in (1, 2, 5, 8)}
    return result


def spared(repository, pairs):
    """How many pairs keep all channels, and that the two masks add up to 2."""
    file = "model/semseg/dpt.py"
    binomial = torch.distributions.binomial.Binomial(probs=0.5)
    scope = {
        "torch": torch,
        "self": types.SimpleNamespace(binomial=binomial),
        "features": [torch.ones(2 * pairs, 3, 64)] * 4,
    }
    repository.run(file, "bs, dim = features[0]", "features = (feature *", scope)
    levels = list(scope["features"])
    assert all(torch.equal(level, levels[0]) for level in levels)
    first, second = levels[0][:pairs], levels[0][pairs:]
    assert torch.equal(first + second, torch.full_like(first, 2))
    return int((first == 1).all(dim=(1, 2)).sum())


def cct(repository):
    ramps = repository.module("utils/ramps.py")
    helpers = types.ModuleType("utils.helpers")
    helpers.initialize_weights = None
    with mock.patch.dict(sys.modules, {"utils.helpers": helpers}):
        decoders = repository.module("models/decoders.py")
    network, x = cct_decoder(decoders), channels_first(arrays.FEATURES)
    # Python 3 does not parse all of this file.
    scope = {"F": torch.nn.functional}
    repository.run("utils/losses.py", "def softmax_mse_loss", "reduction='mean')", scope)
    main_logits = channels_first(arrays.MAIN_LOGITS)
    target = torch.softmax(main_logits, dim=1)
    with mock.patch.object(decoders.np.random, "uniform", lambda low, high: 0.8):
        dropped = decoders.FeatureDropDecoder.feature_dropout(None, x)
    return {
        "decoder": channels_last(network(x)),
        "vat": cct_vat(decoders, network, x),
        "feature_drop": channels_last(dropped),
        **{
            name: channels_last(decoders.guided_masking(x, main_logits, 8, (3, 2), context))
            for name, context in (("context_mask", True), ("object_mask", False))
        },
        "consistency": [
            scope["softmax_mse_loss"](channels_first(logits, grad=True), target).item()
            for logits in arrays.AUXILIARY_LOGITS
        ],
        "ramps": {
            shape: [getattr(ramps, f"{shape}_rampup")(step, 10) for step in arrays.RAMP_STEPS]
            for shape in ("sigmoid", "linear", "cosine", "log", "exp")
        },
        "whole": cct_whole(repository, ramps),
    }


def cct_whole(repository, ramps):
    """The whole loss at a step of the ramp, of a network whose decoders return given logits."""
    scope = {"F": torch.nn.functional, "BaseModel": torch.nn.Module, "ramps": ramps}
    file = "utils/losses.py"
    repository.run(file, "class consistency_weight", "return self.final_w *", scope)
    repository.run(file, "def CE_loss", "return F.cross_entropy", scope)
    repository.run(file, "def softmax_mse_loss", "reduction='mean')", scope)
    published = repository.function("models/model.py", "CCT", scope)
    network = published.__new__(published)
    torch.nn.Module.__init__(network)
    of_main = iter((arrays.LABELED_LOGITS, arrays.MAIN_LOGITS))
    network.encoder = lambda x: x
    network.main_decoder = lambda x: channels_first(next(of_main))
    network.aux_decoders = [
        lambda x, of_main, own=own: channels_first(own, grad=True)
        for own in arrays.AUXILIARY_LOGITS
    ]
    network.mode, network.sup_type, network.sup_loss_w, network.softmax_temp = "semi", "CE", 1, 1
    network.sup_loss, network.unsuper_loss = scope["CE_loss"], scope["softmax_mse_loss"]
    network.unsup_loss_w = scope["consistency_weight"](30.0, arrays.RAMP_LENGTH, rampup_ends=1)
    network.ignore_index = arrays.IGNORE
    network.confidence_masking, network.confidence_th = False, None
    network.use_weak_lables = network.aux_constraint = False
    images = torch.zeros(2, 3, 5, 4)
    labels = torch.tensor(arrays.LABELS_OF_THREE)
    total, losses, _ = network(images, labels, images, None, arrays.RAMP_STEP, epoch=0)
    return {"loss": total.item(), **{name: value.item() for name, value in losses.items()}}


def cct_decoder(decoders):
    network = decoders.upsample(3, 2, 8).double()
    kernels = [network[0].weight] + [network[i].conv.weight for i in (1, 2, 3)]
    with torch.no_grad():
        for kernel, values in zip(kernels, arrays.DECODER_KERNELS, strict=True):
            kernel.copy_(torch.tensor(values.T[..., None, None]))
        for i, values in enumerate(arrays.DECODER_BIASES):
            network[i + 1].conv.bias.copy_(torch.tensor(values))
    return network


def cct_vat(decoders, network, x):
    """The perturbations by "xi eps iterations"."""
    perturbations = {}
    for xi, eps, iterations in ((1e-6, 2.0, 1), (1e-6, 2.0, 2), (0.1, 10.0, 1)):
        start = channels_first(arrays.START) + 0.5
        with mock.patch.object(torch, "rand", lambda shape, start=start: start.clone()):
            r_adv = decoders.get_r_adv(x, network, iterations, xi, eps)
        perturbations[f"{xi} {eps} {iterations}"] = channels_last(r_adv)
    return perturbations
