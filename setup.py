from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension
import glob
setup(
    ext_modules=[CppExtension("moe_ext._C", sorted(glob.glob("csrc/*.cpp") + glob.glob("csrc/cpu/*.cpp")),
        include_dirs=["csrc"], extra_compile_args=["-O3", "-std=c++17", "-fopenmp"])],
    cmdclass={"build_ext": BuildExtension},
)
