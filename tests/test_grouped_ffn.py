"""grouped_ffn: every expert's rows through its feed-forward network."""

from support.ffn_low_rank import FFNLowRank
from support.ffn_operator import FFNOperator
from support.ffn_suite import FFNNumbers


class TestNumbers(FFNNumbers):
    stage = "grouped_ffn"


class TestOperator(FFNOperator):
    stage = "grouped_ffn"


class TestLowRank(FFNLowRank):
    stage = "grouped_ffn"
