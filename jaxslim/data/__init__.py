"""Speech and text data: load_rows -> Rows -> Batches (numpy, fixed shapes); nothing heavy is imported before use."""

from jaxslim.data.audio import AudioError
from jaxslim.data.batch import Batches, suggest_buckets
from jaxslim.data.rows import DataError, Rows, load_rows
from jaxslim.data.tasks import CTCTask, TextTask
from jaxslim.data.text import TextBatches

__all__ = ["AudioError", "Batches", "CTCTask", "DataError", "Rows", "TextBatches", "TextTask", "load_rows",
           "suggest_buckets"]
