"""grouped_ffn: every expert's rows through its feed-forward network."""

from ffn_low_rank import FFNLowRank
from ffn_operator import FFNOperator
from ffn_suite import FFNNumbers


class TestNumbers(FFNNumbers):
    stage = "grouped_ffn"


class TestOperator(FFNOperator):
    stage = "grouped_ffn"


class TestLowRank(FFNLowRank):
    stage = "grouped_ffn"
