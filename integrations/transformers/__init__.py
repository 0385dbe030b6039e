from .configuration import MultiTaskConfig
from .head_config import HeadConfig
from .model import MultiTaskModel
from .output import MultiTaskOutput
