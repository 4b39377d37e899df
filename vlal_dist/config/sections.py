"""The configuration: one typed, frozen section per stage, and all of them as `Config`.

The docstring of a field is its description in `--help`.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from vlal_dist.config.paths import PathsConfig as PathsConfig
from vlal_dist.config.paths import Section as Section
from vlal_dist.config.paths import Texts as Texts


def _inputs(value: Any) -> Any:
    """Files without a split belong to the split `all`."""
    return {"all": value} if isinstance(value, str | list) else value


def _value_texts(value: Any) -> Any:
    """YAML reads 1, yes and no as no texts; both spellings of yes and no are meant."""
    if not isinstance(value, dict):
        return value
    words = {True: ("yes", "true"), False: ("no", "false")}
    texts: dict[Any, Any] = {}
    for key, meaning in value.items():
        for text in words[key] if isinstance(key, bool) else (key,):
            texts[str(text)] = meaning
    return texts


class ImportConfig(Section):
    """From other formats to annotation files that clean reads, and a configuration."""

    inputs: Annotated[dict[str, Texts], BeforeValidator(_inputs)] = {}
    """Split -> files (paths, globs or s3://); a single text or list: undivided, clean.split divides
    it."""
    photos: Texts = []
    """Where the photos are, for pack.images (paths or URLs)."""
    columns: dict[str, str] = {}
    """Table, webdataset: meaning -> name of the column, or key of a sample's json, where it has
    another name (docs/your-data.md)."""
    ignore_columns: Texts = []
    """Table: columns to leave out; any other that is not understood is an error."""
    layout: Literal["auto", "lists", "long", "wide"] = "auto"
    """Table: a row per object with lists of names, a row per object and attribute, or a column per
    attribute; auto: by the columns that are there."""
    attributes: Texts = []
    """Columns that are attributes, of a table of layout wide (absent: all without another meaning)
    or of Open Images' boxes (absent: all flags)."""
    values: Annotated[
        dict[str, Literal["present", "absent", "unknown"]], BeforeValidator(_value_texts)
    ] = {}
    """Text of a value -> what it means, beside those known (docs/your-data.md)."""
    numbers: Literal["auto", "1/0/-1", "1/-1/0", "1/0"] = "auto"
    """Numbers that mean present/absent/unknown; auto: 1/0, and -1 is refused, because it is written
    for absent as well as for unknown."""
    min_certainty: float | None = None
    """Smallest certainty of a label; one below it becomes unknown (CUB: 3, probably)."""
    unlisted: Literal["unknown", "absent"] = "unknown"
    """COCO: what those attributes are that an annotation's list does not name."""
    names: Annotated[
        list[Literal["trim", "lower", "underscores"]],
        BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    ] = []
    """Rules for names of objects and attributes, in this order: blanks around them are removed,
    capitals become small letters, underscores become blanks; empty: as they are."""
    split: str = Field("80/10/10", pattern=r"^\d{1,3}(/\d{1,3}){1,2}$")
    """Shares of train/val/test where inputs are undivided, for clean.split (per cent)."""


class CleanConfig(Section):
    """From annotation files to instances, vocabulary and feasible sets."""

    annotations: dict[str, Texts] = {}
    """Split name -> annotation files, in reading order: JSON, JSON lines (`.jsonl`) or Parquet
    (paths or URLs); `all`: undivided, see `split`."""
    split: str | None = None
    """Shares of train, val and test in per cent, such as 80/10/10, into which the photos of the one
    split `all` are divided by a hash of their names; absent: the annotations name the splits."""
    split_seed: int = Field(0, ge=0)
    """Seed of that hash; another seed is another division."""
    attribute_types: str | None = None
    """JSON: type -> attribute names (path; VAW's attribute_types.json)."""
    attribute_parent_types: str | None = None
    """JSON: parent type -> types (path; VAW's attribute_parent_types.json)."""
    head_tail: str | None = None
    """JSON: head/medium/tail -> attribute names (path); absent: by training positives in VAW's
    shares 47/40/13 %."""
    min_side: float = Field(0.0, ge=0)
    """Smallest box width and height kept (pixels; the paper's on VAW, Sec. 3.1: 50)."""
    merge: Literal["wordnet", "table", "none"] = "none"
    """How object names are merged (on VAW by WordNet, Sec. 3.1; authors' notebook)."""
    wordnet_dir: str = "/usr/share/wordnet"
    """Folder of WordNet 3.0's index/data/exc files (path)."""
    merge_table: str | None = None
    """Saved merge table, JSON name -> representative (path; merge: table)."""
    renames: dict[str, str] = {}
    """Object names rewritten after the merge (notebook)."""
    deleted_attributes: Texts = []
    """Attributes removed everywhere (notebook's 29)."""
    require_positive: bool = False
    """Drop instances left without a positive (as the authors did on VAW)."""
    hide: Literal["none", "vaw_density"] = "none"
    """Training labels hidden before anything is derived from them; vaw_density: an instance keeps 1
    + Poisson(0.8) positives and Poisson(1.2) negatives, at most its own, as many as VAW's training
    crops carry (1.8 and 1.2); none: keep all labels."""
    hide_seed: int = Field(0, ge=0)
    """Seed of the hidden labels; another seed is another dataset."""
    feasible_splits: Texts = ["train"]
    """Splits whose annotations define feasibility (Sec. 2.2)."""
    feasible_top_k: int = Field(0, ge=0)
    """Neighbours per list for enlarged sets, 0: off (released: kn-32 -> 3)."""
    feasible_votes: int = Field(2, ge=1)
    """Votes that admit an attribute to an enlarged set (released: kn-32)."""
    object_vectors: str | None = None
    """Written by `vlal score --object-vectors`: safetensors with `object_vectors` float32 [O, D],
    CLIP text vectors of the object names in id order, and vocabulary_digest in its header (path;
    needed when feasible_top_k > 0)."""
    expected: dict[str, dict[str, int]] = {}
    """Step -> expected counts; clean names the first that differs."""
    max_rejected: float = Field(0.001, ge=0, le=1)
    """Largest share of rejected instances that still counts as success; with --like, without those
    of max_unknown."""
    max_unknown: float = Field(0.5, ge=0, le=1)
    """With --like: largest share of instances rejected because the other dataset lacks their object
    or one of their attributes."""


class PackConfig(Section):
    """From instances and photos to verified WebDataset tars."""

    name: str = Field("own", min_length=1)
    """Dataset name, part of every sample's uid; absent: the last part of paths.root."""
    images: Texts = []
    """Folders, zips, tars, Parquet files with the photos, or s3://, searched for `{image_id}` with
    any suffix of a photo, in order (paths, URLs or patterns; docs/your-data.md)."""
    image_column: str | None = None
    """Column of tables with the bytes of photos; absent: the only one that holds bytes."""
    in_place: bool = False
    """Leave the photos in the tars of pack.images and write index, checksums and labels beside
    (whole upright JPEGs; needs data.likelihood scores)."""
    follow_links: bool = False
    """Read photos whose symbolic links lead out of all of pack.images."""
    max_bytes: int = Field(256_000_000, ge=1)
    """Largest file of a photo (bytes; of a zip's member: unpacked)."""
    shard_bytes: int = Field(256_000_000, ge=1024)
    """Target tar size (bytes; 100 MB to 1 GB suits object stores)."""
    block_bytes: int = Field(524_288, ge=1024)
    """Neighbouring samples read together (bytes; docs/stream.md)."""
    jpeg_quality: int = Field(95, ge=1, le=100)
    """Quality of re-encoded crops (4:4:4)."""
    box_expansion: float = Field(0.0, ge=0, le=2)
    """Margin added around the box, share of its shorter side (authors: intended 0.3, bug gives
    0)."""
    max_pixels: int = Field(64_000_000, ge=1)
    """Largest photo decoded (pixels; against decompression bombs)."""
    background: str = Field("#ffffff", pattern="^#[0-9A-Fa-f]{6}$")
    """Colour below transparent pixels (#rrggbb)."""
    keep_metadata: bool = False
    """Keep EXIF (position, serial numbers), comments and colour profiles of whole JPEGs."""
    workers: int = Field(0, ge=0)
    """Processes, 0: one per core."""
    seed: int = Field(0, ge=0)
    """Seed of the photos' order in the shards."""
    max_rejected: float = Field(0.001, ge=0, le=1)
    """Largest share of rejected instances that still counts as success."""


Templates = Annotated[
    list[str] | dict[str, Texts],
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
]
"""A list of texts, or lists by attribute type."""


class ScoringConfig(Section):
    """CLIP similarities over feasible attributes (Sec. 2.2, Eq. 2)."""

    model: str = "ViT-B-32-quickgelu"
    """open_clip model name (paper: ViT-B/32)."""
    model_config_dir: str | None = None
    """Folder of open_clip model-config JSON files to register (path)."""
    weights: str | None = None
    """Local weights, .safetensors (path), or an open_clip tag such as `openai`, which downloads."""
    templates: Templates = ["a photo of {attribute} {object}"]
    """Prompt templates; several are averaged (authors' notebook: one). A mapping has a list for
    each attribute type that it names, and `default` for the others."""
    temperature: float | None = Field(None, gt=0)
    """Temperature tau of Eq. (2); absent: the model's own 1/exp(logit_scale)."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Encoder arithmetic; similarities and softmax are always fp32."""
    splits: Annotated[Texts, Field(min_length=1)] = ["train"]
    """Splits scored (the loss needs train only)."""
    batch_size: int | None = Field(None, ge=1)
    """Crops per encoder call (samples); absent: a short warm-up chooses."""
    decode_threads: int | None = Field(None, ge=1)
    """Decoding threads per actor; absent: a short warm-up chooses."""
    compile: bool = False
    """Run the encoders through torch.compile (needs a compiler on each node)."""
    embeddings: str | None = None
    """Finished score root whose stored embeddings replace the images: for other templates,
    temperature or feasible sets (path or URL)."""
    max_quarantined: float = Field(0.001, ge=0, le=1)
    """Largest share of unusable crops before the run stops; above 0, at least one crop."""
    actors: int = Field(1, ge=1)
    """Ray actors."""
    gpus_per_actor: float = Field(1.0, ge=0)
    """GPUs reserved per actor, device cuda."""
    cpus_per_actor: float = Field(0.5, gt=0)
    """CPUs reserved per actor."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda on a Ray cluster that was already running (waits for GPUs); otherwise cuda if this
    machine has a GPU, else cpu."""
    use_ray: bool = True
    """False: score in this process, without Ray."""
    max_retries: int = Field(3, ge=0)
    """Retries per shard after an actor is lost."""


class DataConfig(Section):
    """From shards to batches."""

    likelihood: Literal["tar", "scores"] = "tar"
    """Likelihoods from merged tars, or directly from score files."""
    train_split: str = "train"
    """Split used for training."""
    validation_split: str = "val"
    """Split that selects the model."""
    image_size: int = Field(224, ge=64)
    """Square input side (pixels; authors: 224; below 64 BatchNorm fails)."""
    normalize: bool = False
    """Subtract ImageNet mean, divide by std (authors: off)."""
    flip: float = Field(0.5, ge=0, le=1)
    """Probability of a horizontal flip (authors)."""
    decode: Literal["cpu", "gpu"] = "cpu"
    """Where training crops are decoded; gpu: nvJPEG, close but not equal."""
    threads: int = Field(2, ge=1)
    """Decoding threads per rank."""
    prefetch_steps: int = Field(4, ge=1)
    """Batches prepared ahead, per rank (steps)."""
    window_blocks: int = Field(3, ge=1)
    """Shuffle window of a lane (blocks; docs/stream.md)."""
    mix: dict[str, float] = {}
    """Merged root -> passes over it per epoch, fractions allowed; the roots share one vocabulary
    (vlal clean --like); empty: paths.merged once."""
    subset: str | None = None
    """File with a sample key per line: train on these alone (path, URL)."""
    repeat_threshold: float = Field(0.0, ge=0, lt=1)
    """t: a sample is visited max(1, sqrt(t / f)) times an epoch, f the share of samples with the
    rarest of its positives; 0: off (repeat factors of LVIS, 2019)."""
    damage: Literal["strict", "quarantine"] = "strict"
    """A sample that fails its checksum twice: stop, or skip it and count it."""
    max_quarantined: float = Field(0.001, ge=0, le=1)
    """Largest share of quarantined samples before the run stops; above 0, at least one."""
    cache_bytes: int = Field(0, ge=0)
    """Limit of the disk cache for remote shards in paths.cache, shared by the ranks of a node
    (bytes; 0: off)."""
    decoded_bytes: int = Field(0, ge=0)
    """Memory per rank for decoded crops, S x S x 3 bytes each, so that each is decoded once instead
    of every epoch; same bits (bytes; 0: off; docs/experiments.md)."""
    lanes: int = Field(0, ge=0)
    """Parallel lanes of an epoch, 0: by the rule in docs/stream.md."""
    epoch_end: Literal["drop", "exact"] = "drop"
    """Last incomplete batch: dropped (authors) or shorter."""


Gammas = tuple[float, float, float, float]
Unannotated = Literal["draw", "top", "ignore", "negatify", "psl"]


class LossConfig(Section):
    """The loss: a row of Table 1, its exponents, and which unannotated pairs are ignored.

    A new number of the formula is a field here, an entry of `options`, and its use in
    `method/selective_loss.py` and `kernels/src/focal.h`.
    """

    profile: Literal["paper", "released", "corrected"] = "paper"
    """Named set of defaults over all sections; an explicit key overrides it."""
    loss: Literal[
        "selective", "ce_ignoring", "ce_negatifying", "asl_ignoring", "asl_negatifying", "psl"
    ] = "selective"
    """Row of Table 1."""
    num_ignore: Annotated[int, Field(ge=0, strict=True)] | Literal["all"] = 30
    """NUM_IGNORE, attributes drawn per visit (Fig. 3, Table 2), or all."""
    draw_over: Literal["feasible", "unannotated"] = "feasible"
    """Drawing set: all feasible (Fig. 3) or only unannotated feasible."""
    draw: Literal["random", "top"] = "random"
    """Ablation of loss selective: NUM_IGNORE drawn at each visit (Fig. 3), or the top ones by
    weight, the same at every visit (ties: lower attribute id)."""
    draw_weights: Literal["likelihood", "uniform", "cooccurrence"] = "likelihood"
    """Ablation of loss selective: the draw is weighted by CLIP (Eq. (2)), not at all, or by how
    often attribute and object were annotated present together, plus 1; the last two need neither
    scores nor merge (data.likelihood scores reads paths.dataset)."""
    gamma_positive: float = Field(1.0, ge=0)
    """Focusing, annotated present (Sec. 3.2)."""
    gamma_negative: float = Field(2.0, ge=0)
    """Focusing, annotated absent (Sec. 3.2)."""
    gamma_feasible: float = Field(4.0, ge=0)
    """Focusing, feasible (Sec. 3.2)."""
    gamma_infeasible: float = Field(7.0, ge=0)
    """Focusing, infeasible (Sec. 3.2)."""
    margin: float = Field(0.05, ge=0, lt=1)
    """Probability margin of negatives (authors' code, all rows)."""
    detach_focal: bool = True
    """No gradient through the focal weight (authors' code)."""
    psl_prior: str | None = None
    """attributes.parquet of `vlal evaluate --evaluation.split train` on the CE-ignoring model (URL
    or path; needed by loss psl)."""
    psl_threshold: float = Field(0.5, ge=0, le=1)
    """Prior above which PSL ignores."""
    psl_topk: int = Field(5, ge=0)
    """Unannotated ignored per row by PSL, over the batch."""

    @property
    def gammas(self) -> Gammas:
        """Exponents of POSITIVE, NEGATIVE, FEASIBLE and INFEASIBLE pairs."""
        own = (self.gamma_positive, self.gamma_negative, self.gamma_feasible, self.gamma_infeasible)
        return own if self.loss == "selective" else _BASELINES[self.loss][1]

    @property
    def unannotated(self) -> Unannotated:
        """Unannotated pairs without a loss: drawn ones, the likeliest (`top`), all, none, PSL's."""
        own: Unannotated = "draw" if self.draw == "random" else "top"
        return own if self.loss == "selective" else _BASELINES[self.loss][0]

    @property
    def options(self) -> dict[str, float]:
        """The numbers that the formula of a pair reads, named as C++ and CUDA read them."""
        names = ("gamma_positive", "gamma_negative", "gamma_feasible", "gamma_infeasible")
        gammas = dict(zip(names, self.gammas, strict=True))
        return {**gammas, "margin": self.margin, "detach_focal": float(self.detach_focal)}


_BASELINES: dict[str, tuple[Unannotated, Gammas]] = {
    "ce_ignoring": ("ignore", (0.0, 0.0, 0.0, 0.0)),
    "ce_negatifying": ("negatify", (0.0, 0.0, 0.0, 0.0)),
    "asl_ignoring": ("ignore", (1.0, 2.0, 4.0, 4.0)),
    "asl_negatifying": ("negatify", (1.0, 2.0, 4.0, 4.0)),  # textbook ASL: 2 for unannotated, too
    "psl": ("psl", (1.0, 2.0, 4.0, 4.0)),
}


class ModelConfig(Section):
    """A torchvision ResNet whose channels are gated by the object."""

    depth: Literal[18, 34, 50, 101] = 50
    """ResNet depth (paper: 50)."""
    width: int = Field(64, ge=1)
    """Channels of the first stage (every published ResNet: 64); fewer, with proportionally fewer in
    all stages: experiments on CPUs (docs/experiments.md)."""
    weights: str | None = None
    """ImageNet weights: a .safetensors or torchvision state-dict file (path), `imagenet` to
    download torchvision's V1, absent: from scratch."""
    object_gate: bool = True
    """Gate channels by the object (authors' code)."""

    @property
    def backbone(self) -> str:
        """Name of the architecture, for people."""
        return f"ResNet-{self.depth}" + ("" if self.width == 64 else f" of width {self.width}")


class TrainingConfig(Section):
    """Optimiser, schedule, batch, checkpoints."""

    epochs: int = Field(12, ge=1)
    """Passes over the training split (Sec. 3.2)."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after this many steps (smoke tests)."""
    batch_size: int = Field(64, ge=1)
    """Global batch B (samples; Sec. 3.2)."""
    accumulation: int = Field(1, ge=1)
    """Micro-batches per rank, at first start."""
    reference_batch: int = Field(64, ge=1)
    """B at which the loss is the authors' plain sum (docs/method.md)."""
    lr_new: float = Field(7e-4, gt=0)
    """Learning rate of new layers (Sec. 3.2)."""
    lr_pretrained: float = Field(1e-5, gt=0)
    """Learning rate of the backbone (Sec. 3.2)."""
    weight_decay: float = Field(1e-4, ge=0)
    """Coupled L2, off for biases and norms (authors' code)."""
    schedule: Literal["plateau", "cosine", "constant"] = "plateau"
    """Learning-rate schedule on validation mAP (authors: plateau)."""
    plateau_patience: int = Field(2, ge=0)
    """Epochs without gain before a cut (authors)."""
    plateau_factor: float = Field(0.1, gt=0, lt=1)
    """Cut of the rate (authors)."""
    seed: int = Field(99, ge=0)
    """Order, draws, flips, initial weights (authors: 99)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast on GPU, fp32 on CPU (docs/training.md)."""
    kernel: Literal["auto", "reference"] = "auto"
    """Selective loss: auto: the fastest backend that works; reference: plain PyTorch."""
    zero_stage: Literal[0, 1, 2] = 0
    """DeepSpeed ZeRO stage (docs/training.md)."""
    threads: int = Field(0, ge=0)
    """Torch threads per rank, 0: cores / local ranks."""
    checkpoint_epochs: int = Field(1, ge=1)
    """Epochs between checkpoints."""
    checkpoint_steps: int = Field(0, ge=0)
    """Steps between checkpoints within an epoch, 0: none."""
    keep_checkpoints: int = Field(2, ge=1)
    """Newest checkpoints kept beside the best."""
    peer_timeout_s: float = Field(600.0, gt=0)
    """Longest wait of a rank for another, then the job ends (seconds; longer than a save and than a
    step)."""
    log_steps: int = Field(20, ge=1)
    """Steps between log lines and metric updates."""


class EvaluationConfig(Section):
    """Evaluation of a split, and the content of the report."""

    split: str = "test"
    """Split evaluated."""
    predictor: Literal["model", "constant", "clip"] = "model"
    """The run's best model, a constant score, or zero-shot CLIP similarity."""
    unannotated: Literal["excluded", "negative"] = "excluded"
    """Pairs without an annotation, in every metric, here and where training selects its best model:
    left out (Sec. 3.1), or all counted as absent, for data that lists only what is present (tags).
    """
    batch_size: int = Field(128, ge=1)
    """Samples per forward pass and rank."""
    top_k: int = Field(15, ge=1)
    """Attributes per crop in mR@k and F1@k (VAW)."""
    threshold: float = Field(0.5, ge=0, le=1)
    """Score above which mA counts a positive."""
    truth: str | None = None
    """Complete labels, Parquet: instance_id, positive names (path; rendered data only): also gives
    mAP on complete labels."""
    examples: int = Field(12, ge=0)
    """Crops in the page's Fig. 4 grid."""
    example_attributes: int = Field(10, ge=1)
    """Attributes listed per crop (Fig. 4)."""
    curves: int = Field(4, ge=0)
    """Precision-recall curves of each kind on the page (best, worst, ...)."""
    experiments: str | None = None
    """Root of `vlal experiments` whose tables the page shows (URL or path)."""
    compare: Texts = []
    """Result.json files of other runs, shown as further rows of the result table (URLs or
    paths)."""


def evaluation_folder(split: str, predictor: str, *, other: str = "") -> str:
    """Where the evaluation of a split and predictor lies below the run's root.

    Args:
        split, predictor: what was evaluated.
        other: name and digest of another dataset than the run's own.
    """
    return f"evaluation/{split}-{predictor}" + (f"@{other}" if other else "")


class ExportConfig(Section):
    """A folder that loads without the dataset: weights, config.json, thresholds, model card."""

    onnx: bool = False
    """Also write model.onnx, and refuse it when onnxruntime computes something else than torch (pip
    install 'vlal-dist[onnx]')."""
    min_annotated: int = Field(10, ge=1)
    """Annotated positives, and negatives, that an attribute needs on validation for a threshold of
    its own; with fewer, one label moves its F1 too far, and it gets the threshold of all attributes
    pooled."""


class PredictConfig(Section):
    """Attributes of objects in photos, by an exported model."""

    model: str | None = None
    """Folder written by export (path or URL); absent: paths.export."""
    images: str | None = None
    """Photos: a folder, searched recursively, a zip, tars, Parquet files with the photos, a single
    photo, or s3:// (path, URL or pattern); with predict.table, absent: the table's own folder."""
    image_column: str | None = None
    """Column of a Parquet file with the bytes of photos; absent: the only one that holds bytes."""
    table: str | None = None
    """.csv, .tsv, .jsonl, .parquet or .arrow, a row per object: image (below predict.images),
    object, and optionally box ([x, y, width, height] in pixels; empty: the whole photo) and id
    (path); other names of columns: docs/models.md."""
    ignore_columns: Texts = []
    """Columns of the table to leave out; any other that is not understood is an error."""
    follow_links: bool = False
    """Read photos of a table whose symbolic links lead out of predict.images."""
    object: str | None = None
    """Name of the object, without a table; needed unless the model has no object gate."""
    output: str = "runs/predictions.jsonl"
    """Output file, .jsonl, .parquet or .csv (path); unusable rows go to NAME.rejects.jsonl beside
    it, with reasons."""
    top_k: int = Field(10, ge=0)
    """Attributes listed per object, 0: all."""
    thresholds: bool = False
    """Also report which of them are present, by the model's thresholds (F1 on validation)."""
    batch_size: int = Field(64, ge=1)
    """Crops per forward pass."""
    threads: int = Field(2, ge=1)
    """Threads that read, decode and crop."""
    max_pixels: int = Field(64_000_000, ge=1)
    """Largest photo decoded (pixels; against decompression bombs)."""
    max_bytes: int = Field(256_000_000, ge=1)
    """Largest file of a photo (bytes; of a zip's member: unpacked)."""


Count = Annotated[int, Field(ge=0, strict=True)]


class ExperimentsConfig(Section):
    """The runs behind each table, and how many of them run at a time."""

    seeds: list[Count] = Field(default_factory=lambda: [99, 100, 101, 102, 103], min_length=1)
    """Training.seed of each repeat; rows of one seed share initial weights and order (authors:
    99)."""
    jobs: int = Field(1, ge=1)
    """Runs at a time on this machine."""
    ranks: int = Field(1, ge=1)
    """DeepSpeed ranks of each run."""
    num_ignores: list[Count] = [10, 20, 30, 40, 50]
    """NUM_IGNORE of the rows of Table 2; 0 and all are always added (attributes)."""
    replicates: int = Field(1000, ge=1)
    """Replicates of the bootstrap over test photos (count)."""


class ObservabilityConfig(Section):
    """Metrics of ranks and programs, and trackers. Nothing leaves the machine by default."""

    metrics: bool = True
    """Serve /metrics on each rank."""
    metrics_host: str = "127.0.0.1"
    """Address the endpoint binds to."""
    metrics_port: int = Field(9400, ge=1, le=65000)
    """Port of local rank 0; the next free one if taken."""
    targets: str | None = Field(None, min_length=1)
    """Local folder in which each rank announces its endpoint to Prometheus (file_sd)."""
    textfiles: str | None = Field(None, min_length=1)
    """Local folder of node_exporter's textfile collector: every program writes how it ended, and
    pack its counts."""
    trackers: list[Literal["tensorboard", "wandb", "mlflow"]] = ["tensorboard"]
    """Trackers that get training's numbers too, beside metrics.jsonl; wandb and mlflow are
    configured by WANDB_* and MLFLOW_* variables (docs/operations.md)."""


class SuperviseConfig(Section):
    """Restarts of a command that failed, and how long its processes may take to end."""

    restarts: int = Field(10, ge=0)
    """Consecutive failures that are followed by a restart; 0: never restart."""
    backoff_s: float = Field(1.0, gt=0)
    """Wait before the first restart; doubles each time, to 60 (seconds)."""
    healthy_s: float = Field(600.0, gt=0)
    """A start that lasts this long resets the count of failures (seconds)."""
    grace_s: float = Field(120.0, gt=0)
    """Time to save and exit after a stop signal, and for processes left when the command has ended,
    before they are killed (seconds; longer than a save, shorter than the scheduler's own limit)."""


class Config(Section):
    """Every setting of the pipeline; a program reads its own sections."""

    paths: PathsConfig = PathsConfig()
    importing: ImportConfig = ImportConfig()
    clean: CleanConfig = CleanConfig()
    pack: PackConfig = PackConfig()
    scoring: ScoringConfig = ScoringConfig()
    data: DataConfig = DataConfig()
    method: LossConfig = LossConfig()
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    export: ExportConfig = ExportConfig()
    predict: PredictConfig = PredictConfig()
    experiments: ExperimentsConfig = ExperimentsConfig()
    observability: ObservabilityConfig = ObservabilityConfig()
    supervise: SuperviseConfig = SuperviseConfig()
