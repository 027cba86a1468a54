"""A first training step of Keras Applications' Xception, as its users would write it; `cold_start` times it.

    python keras_first_step.py FILE.npz BATCH THREADS

Prints a line when the step is done.
"""

import sys

import keras
import numpy as np
import tensorflow as tf

path, batch, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
tf.config.threading.set_intra_op_parallelism_threads(threads)
with np.load(path) as file:
    images, labels = file["train_images"], file["train_labels"]
model = keras.applications.Xception(weights=None, input_shape=images.shape[1:], classifier_activation=None)
model.compile(
    optimizer=keras.optimizers.SGD(0.045, 0.9),
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    jit_compile=False,  # its own choice, XLA, is several times slower on a CPU
)
done = keras.callbacks.LambdaCallback(on_train_batch_end=lambda step, logs: print("first step done", flush=True))
model.fit(images / np.float32(127.5) - 1, labels, batch_size=batch, verbose=0, callbacks=[done])
