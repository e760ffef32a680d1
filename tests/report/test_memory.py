"""What holds a side's memory, as a report tells it."""

from compress.report import memory
from compress.results.sides import Measurement, Side

ON_A_CPU = {
    "peak_run_bytes": 95e6, "sampled_run_bytes": 99e6, "weight_bytes": 60e6, "buffer_bytes": 1e6, "kv_cache_bytes": 10e6,
    "activation_bytes": 25e6, "allocator_slack_bytes": 5e6, "forecast_run_bytes": 110e6, "forecast_error": 10.0,
}  # fmt: skip
ON_A_GPU = {
    "peak_run_bytes": 100e6, "weight_bytes": 60e6, "buffer_bytes": 1e6, "kv_cache_bytes": 10e6, "activation_bytes": 30e6,
    "allocator_slack_bytes": 20e6, "peak_reserved_bytes": 120e6, "process_gpu_bytes": 600e6, "cuda_context_bytes": 480e6,
}  # fmt: skip


def side(values):
    return Side(role="candidate", model="m", measurements=[Measurement(metric=m, value=v, samples=[[v]]) for m, v in values.items()])


def test_parts_and_shares_on_a_cpu_add_up_to_the_peak():
    assert dict(memory.held([side(ON_A_CPU)])) == {
        "weights": "59.00 MB (59 %)", "buffers": "1.00 MB (1 %)", "keys and values": "10.00 MB (10 %)", "activations": "25.00 MB (25 %)",
        "allocator's slack": "5.00 MB (5 %)", "all": "100.00 MB (100 %)",
    }  # fmt: skip


def test_on_a_gpu_the_whole_is_the_process():
    rows = {name: cells for name, *cells in memory.held([side(ON_A_CPU), side(ON_A_GPU)])}
    assert rows["CUDA context"] == ["-", "480.00 MB (80 %)"]
    assert rows["all"] == ["100.00 MB (100 %)", "600.00 MB (100 %)"]


def test_the_forecast_and_the_samples_stand_beside_the_peak():
    assert memory.checked([None, side(ON_A_CPU)]) == [
        ["peak while running", "-", "95.00 MB"],
        ["sampled every 10 ms, slack included", "-", "99.00 MB"],
        ["foretold from config.json", "-", "110.00 MB"],
        ["the forecast's error", "-", "+10.0 %"],
    ]


def test_nothing_is_told_where_nothing_was_measured():
    assert memory.held([side({}), None]) == memory.checked([side({}), None]) == []
