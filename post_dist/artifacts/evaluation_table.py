"""Names that the table of an evaluation has in its file and on its page."""

TABLE_FILE = "table.json"
MAJORITY = "majority class"
TF_IDF = "TF-IDF + logistic regression"
DP_REGRESSION = "DP logistic regression"
