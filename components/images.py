"""Container images and one decorator for each kind of pod.

The tag is the package version and is never moved to another image, because KFP's cache key contains the image's name.
"""

import functools

from kfp import dsl

VERSION = "0.1.0"
CPU_IMAGE = f"sparse-distill/cpu:{VERSION}"
GPU_IMAGE = f"sparse-distill/gpu:{VERSION}"
LAUNCHER_IMAGE = f"sparse-distill/launcher:{VERSION}"  # no torch: for stages that only talk to a cluster or a bucket

# kfp and the stages are baked into the images: nothing is installed when a pod starts
cpu_pod = functools.partial(dsl.component, base_image=CPU_IMAGE, install_kfp_package=False)
gpu_pod = functools.partial(dsl.component, base_image=GPU_IMAGE, install_kfp_package=False)
launcher_pod = functools.partial(dsl.component, base_image=LAUNCHER_IMAGE, install_kfp_package=False)
