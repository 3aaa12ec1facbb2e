"""The text of `heedful --help`, in sections that fit 80 columns."""

USAGE = """usage: heedful COMMAND ...

train
  configs [CONFIG] [--json]  list the experiments, or describe one
  train CONFIG [--flags]     train an experiment, then evaluate it
      --init-from RUN|hf:DIR     start from a trained model (fine-tuning)
  train RUN [--flags]        resume a run; with --train.steps N, train longer
  import hf:DIR [--flags]    convert a Hugging Face model to a run
  export RUN DIR             convert a run to a Hugging Face model

use a run: a text, each line of standard input, or a prompt at a terminal
  translate RUN ["text"]     translate a text
  generate RUN ["text"]      continue a text
  classify RUN ["text"]      classify a text

look at runs
  runs [DIR]                 list the runs below DIR (runs) with their state
  compare RUN RUN [RUN ...]  show what differs in settings, numbers and curves
  plot RUN                   draw loss, learning rate, gradient norm, throughput
  evaluate RUN [--flags]     measure loss and scores on validation and test data
  attention RUN "text"       draw the attention weights of a text

look at a model
  cores                      show which attention core supports which mask
  inspect CONFIG|RUN         show parameters, memory, FLOPs and masks
  masks CONFIG|RUN           draw the masks, test that attention follows them
  plan CONFIG|RUN [--flags]  estimate memory and time of a step without training
      --topology v5e:16x16 [--search]   for TPUs, which need not be present

check a run
  reproduce RUN [--steps N]  train again from the start, compare every bit
  verify RUN                 train again from a checkpoint, compare every bit

several processes
  train, evaluate, translate, generate, classify, export, reproduce and verify
  can run in several processes. Start every process with the same command. In a
  Slurm step and on a TPU pod slice, the processes find each other; elsewhere,
  give --coordinator HOST:PORT --processes N --process I
  (or HEEDFUL_COORDINATOR, HEEDFUL_PROCESSES, HEEDFUL_PROCESS).

CONFIG is a name that heedful configs lists, or a Python file of your own,
path/to/file.py; rows of a config are CONFIG:ROW. In its place, --config FILE
reads a JSON or YAML file.

heedful COMMAND CONFIG|RUN --help explains every flag.
heedful completion bash|zsh|fish prints a script that completes them.
heedful --version prints the version."""
