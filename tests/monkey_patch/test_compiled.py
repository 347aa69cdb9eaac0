import threading

import torch

from monkey_patch.compiled import compiled


def test_more_shapes_than_the_process_allows_are_compiled_in_any_thread():
    """As in a backward pass, which runs in threads that see no setting of the main one."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    double = compiled(lambda x: x * 2, 24, backend=backend, fullgraph=True, dynamic=False)
    sizes = [range(1, 13), range(13, 25)]
    results = []

    def run(chosen):
        results.extend(double(torch.ones(size)) for size in chosen)

    with torch._dynamo.config.patch(recompile_limit=2):
        run(sizes[0])
        thread = threading.Thread(target=run, args=(sizes[1],))
        thread.start()
        thread.join()
    assert [int(result.sum()) for result in results] == [2 * size for size in range(1, 25)]
    assert len(graphs) == 24
