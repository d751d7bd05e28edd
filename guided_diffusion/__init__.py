"""A reimplementation of ADM, the diffusion models of "Diffusion Models Beat GANs on Image Synthesis".

The paper is Dhariwal & Nichol 2021 (arXiv 2105.05233). Each module imports only modules that are below it in this list:

    classifier_util       training and validation of the noisy-image classifier
    upsampler_util        training of the upsampler
    training_job          setup that all training scripts share: command line, ranks, run folder, data
    train_util            TrainLoop: optimizer steps, moving averages, logging
    training_state        checkpoints of a training run: writing them, finding them and resuming from them
    training_metrics      losses by quartile of the timesteps, throughput
    previews              sample images drawn during training
    models                diffusion models ready to sample; load() for notebooks
    sample_job            sampling jobs over all ranks: batches, upsampling, restarts
    sample_shards         the files that a sampling job writes
    sampling_networks     setup that all sampling scripts share: command line, presets, networks, labels, guidance
    sampler_flags         flags for samplers, image sizes and guidance
    likelihood_util       bits per dimension of a set of images
    class_labels          class labels from the --classes flag: numbers, names or files
    pictures              uint8 images, PNG files and image grids
    presets               the released models: flags, sampling settings and training recipes
    script_util           networks and diffusion processes built from flags
    unet                  UNetModel, SuperResModel, EncoderUNetModel
    respace               diffusion processes on a subset of the timesteps
    gaussian_diffusion    the diffusion process: training losses, sampling steps, likelihood
    solvers               samplers that need few model evaluations: DPM-Solver++ and UniPC
    sampling_loops        sampling loops built from a single sampling step
    guidance              guidance by a classifier or by a second diffusion model
    resample              schedule samplers: distributions of the training timesteps
    image_datasets        batches of images: order, worker processes, random crops and flips
    image_listing         the image files in a folder, and their classes
    image_decoding        decoding and cropping of image files
    fp16_util             mixed precision: loss scaling and float32 master weights
    checkpoint_util       checkpoint files and the config.json beside them
    random_util           random numbers that do not depend on ranks and batch sizes
    nn, losses            network layers; KL divergences and likelihoods
    npz_arrays            arrays in .npz files larger than memory
    downloads             resumable downloads
    logger                metrics and log messages
    dist_util             ranks, devices and collectives
    flags                 help texts of the flags, and argument parsers
    files, errors         local files and blob URLs; one-line messages for errors that users can fix
"""
