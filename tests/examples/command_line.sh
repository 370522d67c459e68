# The command line, from the folder that holds configs/: bash tests/examples/command_line.sh
mpirun -n 2 d2ft-hpc train configs/demo.yaml plan.compute_budget=0.5 train.epochs=2 run.name=half
d2ft-hpc report runs/half
