from setuptools import setup

setup(
    name="guided-diffusion",
    version="0.1.0",
    description='ADM: "Diffusion Models Beat GANs on Image Synthesis", reimplemented',
    license="MIT",
    packages=["guided_diffusion"],
    python_requires=">=3.10",
    install_requires=["torch>=2.6", "numpy>=1.26", "pillow>=10", "tqdm>=4.60", "blobfile>=2.0", "mpi4py>=4.0"],
    extras_require={
        "mpi": ["mpich>=4.2"],  # an MPI library, where the machine has none of its own
        "tensorboard": ["tensorboard>=2.15"],
        "plots": ["matplotlib>=3.8"],
        "safetensors": ["safetensors>=0.4"],
        "datasets": ["lmdb>=1.4", "scipy>=1.11", "scikit-learn>=1.5"],
        "test": [
            "pytest>=8",
            "pytest-xdist>=3",
            "scikit-learn>=1.5",
            "scipy>=1.11",
            "lmdb>=1.4",
            "tensorboard>=2.15",
            "matplotlib>=3.8",
            "safetensors>=0.4",
            "onnxruntime>=1.20",
            "onnxscript>=0.3",
            "thop>=0.1",
        ],
    },
)
