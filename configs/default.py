"""Every field, with its default: LeNet-5 on scikit-learn's handwritten digits.

    python main.py

About 20 s on 2 CPU cores; test accuracy about 0.98. The other files here change a few fields of
this one.
"""

from ml_collections import ConfigDict

# Fields that follow from the dataset, for `--config=configs/MODEL.py:DATASET`: augmentation,
# smoothing, batch and length; see docs/recipes.md.
_CIFAR = {
    "augment": {"crop_padding": 4, "flip": "random"},
    "batch_size": 128,
    "num_epochs": 200.0,
    "schedule": {"warmup_epochs": 5.0},
}
_PHOTOS = {
    "augment": {"random_resized_crop": (0.35, 1.0), "flip": "random"},
    "label_smoothing": 0.1,
    "schedule": {"warmup_epochs": 2.0},
}
DATASETS = {
    "digits": {"data": {"val_fraction": 0.2, "test_fraction": 0.2}, "augment": {"crop_padding": 2}},
    "mnist": {"augment": {"crop_padding": 2, "crop_mode": "constant"}},
    "fashion_mnist": {"augment": {"crop_padding": 2, "flip": "random"}},
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
    "folder": {"data": {"image_size": 224}} | _PHOTOS,
    "images_set": {"data": {"image_size": 112}} | _PHOTOS,
    "fake": {},
}


def get_config(dataset: str = "digits") -> ConfigDict:
    """The config for one of `DATASETS`."""
    if dataset not in DATASETS:
        raise ValueError(
            f'unknown dataset "{dataset}" after the colon; use one of {", ".join(DATASETS)}'
        )
    config = ConfigDict()

    # One number for everything random: initialisation, order of the images, augmentation, splits.
    config.seed = 0

    config.model = ConfigDict()
    # See classic_cnns.list_models().
    config.model.name = "lenet5"
    # Of the computation: "float32", "bfloat16", "float16" (with a loss scale that finds itself), or
    # "auto" = bfloat16 on GPU and TPU, float32 on CPU.
    config.model.dtype = "auto"
    # "frozen" = BatchNorm normalises by the statistics it starts with, for fine-tuning.
    config.model.bn = "train"
    # Further arguments of the network, see its class: --config.model.options.stem=cifar, say.
    config.model.options = ConfigDict()
    # Weights to start from: "torchvision:IMAGENET1K_V1", a weight file, or a run directory; the
    # classifier starts fresh where the number of classes differs. "" = everything starts fresh.
    config.model.pretrained = ""

    config.data = ConfigDict()
    # digits, cifar10, cifar100, mnist, fashion_mnist, folder, images_set, csv, npz, tfds:NAME or
    # fake.
    config.data.source = dataset
    # Where its files are or are downloaded to; "" = the user's cache directory. A folder, csv or
    # npz source needs it.
    config.data.dir = ""
    # Side in pixels of what the network takes; 0 = the source's own size.
    config.data.image_size = 0
    # How files get that size: "squash", "crop" (the centre) or "letterbox".
    config.data.resize = "squash"
    # "resident" (decoded images stay in memory), "stream" (decoded while training), or "auto" = the
    # first where they take no more than resident_gb and half of the free memory.
    config.data.loader = "auto"
    config.data.resident_gb = 4.0
    # Directory of decoded images, made once for all runs ("default" = in the user's cache
    # directory); "" = none.
    config.data.cache = ""
    # Threads that decode; 0 = one a core.
    config.data.workers = 0
    # "error", or "skip" up to this share of files that cannot be decoded.
    config.data.on_bad_image = "error"
    config.data.max_bad_fraction = 0.001
    # Against rare classes being neglected: "none"; "sampler" = every class equally often;
    # "class_weights" = the loss of a class times the inverse of its share; "logit_adjustment" = the
    # log of its share added to the logits in the loss (Menon et al. 2021).
    config.data.balance = "none"
    # Share of the training images, class by class, for validation where the source has no such
    # split.
    config.data.val_fraction = 0.1
    # The same for the test split, where the source has no splits at all.
    config.data.test_fraction = 0.1
    # The split.json of a run, whose val and test are taken in place of drawing them.
    config.data.split_file = ""
    # Of tfds: what it calls the splits, slices included ("train[:90%]"); "" = train, validation and
    # test.
    config.data.train_split = ""
    config.data.val_split = ""
    config.data.test_split = ""

    # On the device, inside the training step.
    config.augment = ConfigDict()
    # A random part of every image, resized: smallest and largest share of its area, for example
    # (0.25, 1.0); () = off.
    config.augment.random_resized_crop = ()
    # Shift by up to this many pixels; 0 = off.
    config.augment.crop_padding = 0
    # What comes in from outside: "reflect" or "constant" (black).
    config.augment.crop_mode = "reflect"
    # Mirror left to right: "none", "random" = by the toss of a coin, "alternating" = every image
    # in every other epoch.
    config.augment.flip = "none"
    # Random operations: "none", "randaugment" (two of moderate strength for each image) or
    # "trivialaugment" (one of any strength).
    config.augment.auto_augment = "none"
    # Most that (brightness, contrast, saturation, hue) change, for example (0.4, 0.4, 0.4, 0.1);
    # () = off.
    config.augment.color_jitter = ()
    # Share of the images that lose a rectangle.
    config.augment.random_erasing = 0.0
    # What takes its place: "const" (black) or "pixel" (noise).
    config.augment.erasing_mode = "const"
    # Side of a black square at a random place, in pixels; 0 = off.
    config.augment.cutout_size = 0
    # Blend images in pairs, with shares from Beta(alpha, alpha); 0 = off. 0.2 for photos.
    config.augment.mixup_alpha = 0.0
    # Paste a part of another image, with shares from Beta(alpha, alpha); 0 = off. Usually 1.
    # With both alphas, each batch gets one of the two.
    config.augment.cutmix_alpha = 0.0

    # Images a step, over all devices.
    config.batch_size = 64
    # Parts that a batch is computed in, one after the other, where it does not fit into memory: the
    # same update, but BatchNorm sees each part alone.
    config.accumulate_steps = 1
    # Length of the training, in epochs or in steps. Where a field in steps is not 0, it counts.
    config.num_epochs = 30.0
    config.num_steps = 0

    config.optimizer = ConfigDict()
    # sgd, adam, nadam, adagrad, rmsprop, adamw, lamb, lion, …: any of
    # classic_cnns.optimizers.OPTIMIZERS.
    config.optimizer.name = "sgd"
    # Peak rate, for the whole batch; or for this many images of it (256, say), so that it grows
    # with batch_size. 0 = for the whole batch.
    config.optimizer.learning_rate = 0.05
    config.optimizer.learning_rate_per = 0
    # Kernels only; decoupled for adamw, lamb, lion and their like, else L2 as in PyTorch's SGD.
    config.optimizer.weight_decay = 5e-4
    # Largest global norm of the gradient; 0 = no limit.
    config.optimizer.clip_norm = 0.0
    # Largest absolute value of a gradient; 0 = no limit.
    config.optimizer.clip_value = 0.0
    # Largest ratio of the norms of gradient and weights (adaptive gradient clipping); 0 = no limit.
    config.optimizer.agc = 0.0
    # Sharpness-aware minimisation: how far uphill the gradient is taken (0.05, say), at twice the
    # cost; 0 = off.
    config.optimizer.sam_rho = 0.0
    # Lookahead: after this many steps (5, say) the weights go back to where they were that long ago
    # but for lookahead_rate of the way; 0 = off.
    config.optimizer.lookahead_steps = 0
    # See lookahead_steps.
    config.optimizer.lookahead_rate = 0.5
    # Where lookahead_rate gets at the end of the training, with the cube of the share that is done;
    # 0 = it stays.
    config.optimizer.lookahead_final_rate = 0.0
    # Schedule-free (Defazio et al. 2024), in place of a falling rate: the share of the average in
    # where gradients are taken (0.9, say); 0 = off. With schedule.name="constant", without
    # ema_decay: its average is evaluated as those are.
    config.optimizer.schedule_free = 0.0
    # Settings by parameter name: (regular expression, {"lr": factor, "weight_decay": number,
    # "frozen": True}), …; the first that matches a name decides. For example
    # (("^head/", {"lr": 10.0}), ("^stage1", {"frozen": True})).
    config.optimizer.rules = ()
    # Of sgd only.
    config.optimizer.momentum = 0.9
    config.optimizer.nesterov = True
    # Whose constants (ε, decay, …): "optax", "keras" or "torch".
    config.optimizer.defaults = "optax"
    # Further arguments of the optax function: --config.optimizer.options.b1=0.95, say.
    config.optimizer.options = ConfigDict()

    config.schedule = ConfigDict()
    # constant, cosine, cosine_restarts, one_cycle, linear, polynomial, step, multistep, exponential
    # or plateau; schedule.png shows it.
    config.schedule.name = "cosine"
    # Linear rise to the peak, part of the training.
    config.schedule.warmup_epochs = 1.0
    config.schedule.warmup_steps = 0
    # The rate is multiplied by factor, of "multistep" after these shares of the training, of
    # "step" and (smoothly) "exponential" after each period, a share too, of "plateau" when the
    # validation loss has not fallen in patience evaluations.
    config.schedule.factor = 0.1
    config.schedule.milestones = (0.5, 0.75)
    config.schedule.period = 0.3
    config.schedule.patience = 5
    # Of "cosine", "cosine_restarts" (after each period), "one_cycle", "linear" and "polynomial":
    # last rate as a share of the peak.
    config.schedule.final_factor = 0.0
    # Of "polynomial".
    config.schedule.power = 2.0

    # "cross_entropy"; "bce" = every class apart, for itself or not; "focal" = cross-entropy that
    # cares less for what is easy. Validation and test report plain cross-entropy, always.
    config.loss = "cross_entropy"
    # Share of the target spread over all classes.
    config.label_smoothing = 0.0

    # Share of a moving average of the weights that is kept at each step (0.999, say); the average
    # is evaluated beside the weights, and has a best checkpoint of its own. 0 = none.
    config.ema_decay = 0.0

    config.early_stopping = ConfigDict()
    # Evaluations in a row without an improvement after which the training ends; 0 = never.
    config.early_stopping.patience = 0
    # What counts (eval_accuracy, eval_loss, ema_eval_accuracy, train_loss, …), whether more or less
    # of it is better ("max", "min", "auto" = less of a loss), and the least that is an improvement.
    config.early_stopping.metric = "eval_accuracy"
    config.early_stopping.mode = "auto"
    config.early_stopping.min_delta = 0.0

    # Validation and test take the mean of the logits of each image and its mirror image.
    config.test_time_flip = False
    # The same with shifts by so many pixels, up-left and down-right, which count as much as the
    # image in its place; 0 = off.
    config.test_time_shift = 0

    # Steps between two records of the training loss.
    config.log_every_steps = 50
    # Validation, each time with a checkpoint; 0 in both = at the end alone.
    config.eval_every_epochs = 1.0
    config.eval_every_steps = 0
    # Checkpoints between validations; 0 in both = none.
    config.checkpoint_every_epochs = 1.0
    config.checkpoint_every_steps = 0
    # The most steps in one call of the device; 0 = 16. On CPU as many as take two seconds.
    # Streamed images are trained on step by step.
    config.steps_per_dispatch = 0
    # After a loss or gradient that is not finite: "stop", or "rollback" to the newest checkpoint
    # and go on from there with the learning rate times rollback_factor, at most max_rollbacks
    # times a run.
    config.on_divergence = "stop"
    # See on_divergence.
    config.rollback_factor = 0.5
    # See on_divergence.
    config.max_rollbacks = 3
    # Before the first step, look for dead units and vanishing gradients, too: compiles the network
    # once more (seconds). Input, stem and rate are looked at in any case.
    config.watch_gradient = False
    # At the end, write all weights as text: name, shape, values.
    config.weights_txt = False

    config.update(DATASETS[dataset])
    return config
