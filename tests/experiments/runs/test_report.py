"""The curves of a report."""

from experiments.runs import report


class Counted(list):
    """A list that knows how often it was gone through."""

    passes = 0

    def __iter__(self):
        Counted.passes += 1
        return super().__iter__()


def test_the_curves_do_not_go_through_the_log_once_a_record(tmp_path):
    passes = []
    for epochs in (2, 20):
        records = [
            {"phase": phase, "step": 3 * epoch, "epoch": epoch, "task_loss": 1.0,
             "test_accuracy": 0.5, "distillation_loss": 1.0}
            for phase in report.TITLES for epoch in range(1, epochs + 1)
        ]  # fmt: skip
        Counted.passes = 0
        report._curves(Counted(records), "w2", tmp_path / "curves.png")
        passes.append(Counted.passes)
    assert passes[0] == passes[1]


def test_an_epoch_on_the_curves_is_a_pass_over_the_data():
    records = [{"step": k, "epoch": 1 + k // 5} for k in (2, 4, 6)]
    assert [e for e, _ in report._with_epochs(records)] == [1, 1, 2]  # no evaluation: as counted
    records[1]["test_accuracy"] = 0.5
    assert [e for e, _ in report._with_epochs(records)] == [0.5, 1, 1.5]
