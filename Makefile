# Two commands for a fresh machine: `make quickstart` trains and samples a small model, `make test` runs the tests.

PYTHON ?= python3
BIN := .venv/bin
RUN := $(BIN)/mpiexec -n 2 $(BIN)/python
OUT := quickstart

.PHONY: quickstart showcase lint test test-slow

.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

# Run two test processes with one thread each: the small networks of the tests gain little from more threads.
test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quiet --numprocesses 2 --dist loadfile tests

lint: .venv/installed
	$(BIN)/ruff check .

# Compare the evaluator with the original's values: 810 images through Inception take more than a minute.
test-slow: .venv/installed
	$(BIN)/python -m pytest --quiet -m slow tests

# make prints each command before running it, so the commands can also be run by hand.
quickstart: .venv/installed
	rm -rf $(OUT)
	$(BIN)/python datasets/digits.py $(OUT)/digits --held_out_dir $(OUT)/digits_held_out
	$(RUN) scripts/image_train.py --data_dir $(OUT)/digits --log_dir $(OUT)/diffusion --seed 0 \
	    --image_size 16 --in_channels 1 --num_channels 32 --channel_mult 1,2 --num_res_blocks 1 \
	    --attention_resolutions 8 --num_head_channels 32 --learn_sigma True --noise_schedule cosine \
	    --random_flip False --batch_size 32 --lr 1e-3 --ema_rate 0.995 --lr_anneal_steps 1200 --log_interval 250 \
	    --sample_interval 400
	$(RUN) scripts/classifier_train.py --data_dir $(OUT)/digits --log_dir $(OUT)/classifier --seed 0 \
	    --val_data_dir $(OUT)/digits_held_out --eval_interval 50 --image_size 16 --in_channels 1 --num_classes 10 --classifier_width 64 --classifier_depth 1 \
	    --classifier_attention_resolutions 8 --noise_schedule cosine --random_flip False --random_crop False \
	    --batch_size 64 --lr 1e-3 --anneal_lr True --weight_decay 0.05 --iterations 300 --log_interval 100
	$(RUN) scripts/classifier_sample.py --model_path $(OUT)/diffusion/ema_0.995_001200.pt \
	    --classifier_path $(OUT)/classifier/model000300.pt --classifier_scale 0 --log_dir $(OUT)/unguided \
	    --classes balanced --num_samples 100 --batch_size 50 --timestep_respacing 100
	$(RUN) scripts/classifier_sample.py --model_path $(OUT)/diffusion/ema_0.995_001200.pt \
	    --classifier_path $(OUT)/classifier/model000300.pt --classifier_scale 6 --log_dir $(OUT)/guided \
	    --classes balanced --num_samples 100 --batch_size 50 --timestep_respacing 100
	$(BIN)/python datasets/judge_digits.py $(OUT)/unguided/samples_100x16x16x1.npz $(OUT)/guided/samples_100x16x16x1.npz
	@echo "Pictures, a row for each digit asked for: $(OUT)/unguided/samples_100x16x16x1.png and $(OUT)/guided/samples_100x16x16x1.png"

# Reproduce the paper's claims on emoji: about 80 minutes of training and an hour of sampling on two cores. Install the
# emoji font first: apt install fonts-noto-color-emoji unicode-data. An interrupted showcase continues when run again.
showcase: .venv/installed
	$(BIN)/python benchmarks/showcase.py --out_dir showcase
