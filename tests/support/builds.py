"""Builds of small sources, by a real compiler or a fake one."""

import sys

from rigl_keras.kernels import library, toolchain

OPS = """
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "lanes.h"

REGISTER_OP("RiglStandIn").Output("doubled: int32");

class StandIn : public tensorflow::OpKernel {
 public:
  using OpKernel::OpKernel;
  void Compute(tensorflow::OpKernelContext* context) override {
    tensorflow::Tensor* output = nullptr;
    OP_REQUIRES_OK(context, context->allocate_output(0, {}, &output));
    int sum = rigl::portable::twice(20);
#ifdef RIGL_X86
    // Only compiled in, and not called: the machine may not have them.
    sum += (&rigl::avx2::twice != &rigl::avx512::twice) ? 2 : 0;
#else
    sum += 2;
#endif
    output->scalar<int>()() = sum;
  }
};
REGISTER_KERNEL_BUILDER(
    Name("RiglStandIn").Device(tensorflow::DEVICE_CPU), StandIn);
"""
LANES = """
#include "lanes.h"
namespace rigl::RIGL_ISA { int twice(int x) { return 2 * x; } }
"""
HEADER = """
namespace rigl::portable { int twice(int x); }
#ifdef RIGL_X86
namespace rigl::avx2 { int twice(int x); }
namespace rigl::avx512 { int twice(int x); }
#endif
"""

NETWORK = """
namespace hidden { int length(); }
#pragma GCC visibility push(default)
extern "C" int rigl_stand_in() { return 10 * hidden::length(); }
#pragma GCC visibility pop
namespace rigl::portable_4 { int length(); }
int hidden::length() { return rigl::portable_4::length(); }
"""
TILES = """
#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
namespace rigl::JOIN(RIGL_ISA, RIGL_LENGTH) {
int length() { return RIGL_LENGTH; }
}
"""

# A fake compiler for tests about files: it logs its arguments, takes a moment,
# and writes the file after -o. Without packages, Python starts in 10 ms.
STUB = """#!{python} -IS
import sys
with open({calls!r}, "a") as calls:
    calls.write(" ".join(sys.argv[1:]) + "\\n")
if "--version" in sys.argv:
    print("stub {version}")
elif "-c" in sys.argv and {broken!r} in sys.argv[sys.argv.index("-c") + 1]:
    sys.exit("lanes.cc: In function:\\nlanes.cc:3:1: error: no such lane\\n"
             "lanes.cc:4:1: error: another")
else:
    if {seconds}:
        import time
        time.sleep({seconds})
    with open(sys.argv[sys.argv.index("-o") + 1], "w") as made:
        made.write("made")
"""


def place(tmp_path, monkeypatch):
    """Returns a folder with sources, without builds and failed attempts."""
    sources = tmp_path / "sources"
    sources.mkdir()
    serving = sources / "serving"
    serving.mkdir()
    folders = {"kernels": sources, "serving": serving}
    for name in (*toolchain._OPERATIONS, *toolchain._PER_INSTRUCTION_SET):
        folder, file = name.split("/")
        (folders[folder] / file).write_text("")
    (sources / "convolution_ops.cc").write_text(OPS)
    (sources / "lanes.cc").write_text(LANES)
    (sources / "lanes.h").write_text(HEADER)
    (serving / "network.cc").write_text(NETWORK)
    (serving / "tiles.cc").write_text(TILES)
    monkeypatch.setattr(toolchain, "_SOURCES", folders)
    monkeypatch.setattr(library, "_module", None)
    monkeypatch.setattr(library, "_reason", None)
    # Ignores the operations that other tests have registered.
    monkeypatch.setattr(library, "_registered", lambda plan: None)
    monkeypatch.setattr(library.tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("RIGL_KERAS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("RIGL_KERAS_KERNELS", raising=False)
    return tmp_path


def stub(place, monkeypatch):
    """Returns a function that makes fake compilers, which log their calls."""

    def make(version=1, seconds=0.0, broken="nothing"):
        compiler = place / "stub compiler"
        compiler.write_text(
            STUB.format(
                python=sys.executable,
                calls=str(place / "calls"),
                version=version,
                seconds=seconds,
                broken=broken,
            )
        )
        compiler.chmod(0o755)
        monkeypatch.setenv("CXX", str(compiler))
        return compiler

    make()
    return make


def calls(place, *, building=True):
    """Returns the calls of the fake compiler, without those of its version."""
    path = place / "calls"
    lines = path.read_text().splitlines() if path.exists() else []
    return [c for c in lines if not building or c != "--version"]


def said(caplog):
    """Returns what this package has logged."""
    return [r.getMessage() for r in caplog.records if r.name == "rigl_keras"]


def commands():
    """Returns the number of commands of a build."""
    plan = toolchain.planned_build()
    return len(plan.objects) + len(plan.libraries)
