"""Speech and text data: load_rows -> Rows -> Batches (numpy, fixed shapes); nothing heavy is imported before use."""

from jaxslim.data.audio import AudioError
from jaxslim.data.batch import Batches, suggest_buckets
from jaxslim.data.classes import AudioTask, Classes
from jaxslim.data.extractor import Extractor
from jaxslim.data.language import CausalTask, TokenBatches
from jaxslim.data.rows import DataError, Rows, load_rows
from jaxslim.data.tasks import CTCTask
from jaxslim.data.text import TextBatches
from jaxslim.data.tokenized import PieceTask, Seq2SeqTask, TextTask, task_of

__all__ = ["AudioError", "AudioTask", "Batches", "CTCTask", "CausalTask", "Classes", "DataError", "Extractor",
           "PieceTask", "Rows", "Seq2SeqTask", "TextBatches", "TextTask", "TokenBatches", "load_rows",
           "suggest_buckets", "task_of"]
