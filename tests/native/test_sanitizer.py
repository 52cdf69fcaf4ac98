"""The kernel under the address and undefined-behaviour sanitizers, in sizes where rows, columns and lanes are ragged."""

import subprocess
from pathlib import Path

import pytest

from icl.engine import paths
from icl.native import build

DRIVER = r"""
#include KERNEL
#include <cstdio>
#include <cstdlib>
int main() {
    for (int64_t batch : {1, 19, 300})
        for (int examples = 1; examples <= MAX_EXAMPLES; examples++)
            for (int threads : {1, 3}) {
                std::vector<float> params(parameter_count()), xs(batch * examples * TASK_SIZE), ys(batch * examples);
                std::vector<float> losses(examples), grad(parameter_count());
                for (auto* values : {&params, &xs, &ys})
                    for (float& value : *values) value = std::rand() / float(RAND_MAX) - 0.5f;
                const size_t size = (workspace_size(threads) + 63) / 64 * 64;
                char* workspace = static_cast<char*>(std::aligned_alloc(64, size));
                loss_and_grad(params.data(), xs.data(), ys.data(), batch, examples, threads, workspace, losses.data(), grad.data());
                std::vector<float> out(batch * examples);
                predictions(params.data(), xs.data(), ys.data(), batch, examples, threads, workspace, out.data());
                for (float value : out) if (!(std::fabs(value) < 1e6f)) return 1;
                std::free(workspace);
                for (float value : grad) if (!(std::fabs(value) < 1e6f)) return 1;
            }
    std::puts("clean");
}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes", [(3, 5, 14, 23, 2, 2, 1, 1, 1), (2, 3, 33, 7, 3, 1, 0, 0, 0), (5, 4, 8, 51, 2, 3, 1, 0, 0)], ids=str
)
def test_kernel_is_clean_under_sanitizers(sizes, tmp_path):
    names = "TASK_SIZE MAX_EXAMPLES EMBED_SIZE MLP_SIZE NUM_HEADS NUM_LAYERS LAYER_NORM INCLUDE_OUTPUT RESIDUAL_DOUBLED"
    macros = [f"-D{name}={size}" for name, size in zip(names.split(), sizes, strict=True)]
    kernel = Path(paths.__file__).with_name("kernel.cpp")
    (tmp_path / "driver.cpp").write_text(DRIVER.replace("KERNEL", f'"{kernel}"'))
    program = tmp_path / "driver"
    flags = [
        "-std=c++17",
        "-O1",
        "-g",
        "-march=native",
        "-pthread",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
    ]
    subprocess.run(
        [build.find_compiler(), *flags, *macros, str(tmp_path / "driver.cpp"), "-o", str(program)], check=True
    )
    assert subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout == "clean\n"
