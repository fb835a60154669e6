"""Kernels of captured steps: bytes and categories by hand, and the table. The simulated GPU's rehearsal counts them."""

import json

import pytest

from benchmarks import kernels, tables
from benchmarks.kernels import category, convolution_bytes, markdown_table


def test_command_needs_the_simulated_gpu(run):
    code, _, err = run("bench", "kernels")
    assert code == 2
    assert err.count("\n") == 1
    assert "tests/fake_gpu/run.sh" in err


def test_convolution_moves_each_operand_once():
    shapes = "(128, 3, 32, 32) (16, 3, 3, 3) (128, 16, 32, 32)"
    elements = 128 * 3 * 32 * 32 + 16 * 3 * 3 * 3 + 128 * 16 * 32 * 32
    assert convolution_bytes(f"CUDNN fprop {shapes} torch.bfloat16") == 2 * elements
    assert convolution_bytes(f"CUDNN wgrad {shapes} torch.float32") == 4 * elements


FUSED = "_fused__native_batch_norm_legit_functional_"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("dgrad (128, 64, 8, 8) (64, 64, 3, 3) (128, 64, 8, 8) torch.bfloat16", "convolutions"),
        (f"triton_per{FUSED}copy__3", "batch norm, statistics"),
        (f"triton_poi{FUSED}add_relu_6", "batch norm, output"),
        (f"triton_per{FUSED}add_mean_relu_threshold_backward_24", "batch norm, output"),
        ("triton_red_fused_add_native_batch_norm_backward_threshold_backward_32", "batch norm, gradient sums"),
        (f"triton_red{FUSED}native_batch_norm_backward_39", "batch norm, gradient sums"),
        (f"triton_poi{FUSED}convolution_backward_native_batch_norm_backward_40", "pointwise gradients"),
        ("triton_poi_fused_add_threshold_backward_38", "pointwise gradients"),
        ("triton_poi_fused__to_copy_12", "casts of weights"),
        ("triton_poi_fused__to_copy_convolution_relu_1", kernels.OTHER),
        ("triton_poi_fused_add_copy__29", "counts of batches"),
        ("triton_per_fused__log_softmax__log_softmax_backward_data__to_copy_0", kernels.OTHER),
        ("aten.isfinite.default", "metrics, schedule, checks"),
        ("aten.addmm.out", kernels.OTHER),
    ],
)
def test_category_follows_from_the_name(name, kind):
    assert category(name) == kind


def result(commit, **calls):
    """Result of one step, of whose categories each kernel moves 1.5 MB."""
    figures = {kind: {"calls": count, "bytes": 1_500_000 * count} for kind, count in calls.items()}
    total = {key: sum(each[key] for each in figures.values()) for key in ("calls", "bytes")}
    environment = {"device": "simulated", "commit": commit, "started": "2026-01-02T03:04", "versions": {"torch": "2"}}
    rows = [{"name": "baseline/resnet20/b128", "categories": figures, "kernels_per_step": total}]
    return {"schema": 1, "benchmark": "kernels", "environment": environment, "rows": rows}


def lines_of(table):
    return dict(line.strip("| \n").split(" | ") for line in table.splitlines() if line)


def test_table_shows_changes_from_before_to_after():
    before, after = result("a", convolutions=6, optimiser=1500), result("b", convolutions=6, optimiser=2)
    lines = lines_of(markdown_table(before, after))
    assert lines["kernels of a step; MB"] == "baseline/resnet20/b128"
    assert lines["convolutions"] == "6; 9"
    assert lines["optimiser"] == "1,500 → 2; 2,250 → 3"
    assert lines["total"] == "1,506 → 8; 2,259 → 12"
    assert lines_of(markdown_table(after))["total"] == "8; 12"


def test_document_gets_the_table_of_two_results_and_the_origin_of_both(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    for commit in ("aaa", "bbb"):
        (tmp_path / f"{commit}.json").write_text(json.dumps(result(commit, convolutions=1 + (commit == "bbb"))))
    text = tables.with_tables("<!-- kernels: aaa.json,bbb.json -->\nold\n<!-- end -->\n")
    assert "| total | 1 → 2; 2 → 3 |" in text
    assert [word in text for word in ("commit aaa", "commit bbb", "old")] == [True, True, False]
