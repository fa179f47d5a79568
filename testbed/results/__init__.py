"""From the records of a run to tables, a verdict and a summary. The modules import pandas: import
them where needed."""
