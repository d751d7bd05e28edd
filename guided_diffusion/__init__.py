"""ADM, the system of "Diffusion Models Beat GANs on Image Synthesis" (Dhariwal & Nichol 2021), reimplemented.

Where things are; imports point down this list only.

    classifier_util       training and validating the noisy-image classifier
    upsampler_util        training the upsampler
    training_job          training scripts: command line, ranks, run folder, data
    train_util            TrainLoop: steps, moving averages, logging
    training_state        what a checkpoint of a run holds: writing, finding and resuming it
    training_metrics      losses by quartile of the timesteps, throughput
    previews              pictures of samples during training
    models                diffusion models ready to sample; load() for notebooks
    sample_job            sampling jobs over all ranks: batches, upsampling, restarts
    sample_shards         the files of a sampling job
    sampling_networks     sampling scripts: command line, presets, networks with weights, labels, guides
    sampler_flags         the flags of samplers, sizes and guidance
    likelihood_util       bits per dimension of a set of images
    class_labels          --classes: labels from numbers, names and files
    pictures              uint8 images, PNG files, grids
    presets               the released models: flags, sampling settings, training recipes
    script_util           from flags to models and processes
    unet                  UNetModel, SuperResModel, EncoderUNetModel
    respace               the process on some of the timesteps
    gaussian_diffusion    the diffusion process: training losses, steps, likelihood
    solvers               samplers with few evaluations: DPM-Solver++, UniPC
    sampling_loops        from a step to a sampling loop
    guidance              guidance by a classifier or a second model
    resample              distributions over the timesteps to train on
    image_datasets        batches of images: order, workers, random crops and flips
    image_listing         the images of a folder, and their classes
    image_decoding        from an image file to pixels
    fp16_util             mixed precision: loss scaling, master weights
    checkpoint_util       a checkpoint file, and the config.json beside it
    random_util           random numbers of a sample or training image
    nn, losses            layers; divergences and likelihoods
    npz_arrays            arrays in .npz files larger than memory
    downloads             files from the web, resumable
    logger                metrics and messages
    dist_util             ranks, devices and collectives
    flags                 what each flag means; parsers
    files, errors         local files and URLs; users' mistakes in one line
"""
