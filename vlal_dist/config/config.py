"""The whole configuration: one section per stage."""

from vlal_dist.config.clean import CleanSection
from vlal_dist.config.data import DataSection
from vlal_dist.config.evaluation import EvaluationSection
from vlal_dist.config.experiments import ExperimentsSection
from vlal_dist.config.export import ExportSection
from vlal_dist.config.method import MethodSection
from vlal_dist.config.model import ModelSection
from vlal_dist.config.observability import ObservabilitySection
from vlal_dist.config.pack import PackSection
from vlal_dist.config.paths import PathsSection
from vlal_dist.config.predict import PredictSection
from vlal_dist.config.scoring import ScoringSection
from vlal_dist.config.section import Section
from vlal_dist.config.supervise import SuperviseSection
from vlal_dist.config.training import TrainingSection


class Config(Section):
    """Every knob of the pipeline; a program reads its own sections."""

    paths: PathsSection = PathsSection()
    clean: CleanSection = CleanSection()
    pack: PackSection = PackSection()
    scoring: ScoringSection = ScoringSection()
    data: DataSection = DataSection()
    method: MethodSection = MethodSection()
    model: ModelSection = ModelSection()
    training: TrainingSection = TrainingSection()
    evaluation: EvaluationSection = EvaluationSection()
    export: ExportSection = ExportSection()
    predict: PredictSection = PredictSection()
    experiments: ExperimentsSection = ExperimentsSection()
    observability: ObservabilitySection = ObservabilitySection()
    supervise: SuperviseSection = SuperviseSection()
