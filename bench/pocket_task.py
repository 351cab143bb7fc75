"""A task of lmms-eval with the pocket model's held-out scenes, in a folder for --include_path.

python -m bench.pocket_task FOLDER --questions 64

Scene i asks what `restore-ext eval pocket` asks of it, and right is the same word.
"""

import argparse
import json
from pathlib import Path

from restore_ext.pocket import held_out, parse

TASK = "pocket_scenes"
YAML = """\
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {questions}
test_split: test
output_type: {output_type}
doc_to_visual: !function pictures.doc_to_visual
doc_to_text: question
{answers}
"""
GENERATED = """\
doc_to_target: answer
process_results: !function pictures.process_results
generation_kwargs:
  max_new_tokens: {new_tokens}
  temperature: 0
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true"""
RATED = """\
doc_to_target: answer
doc_to_choice: choices
target_delimiter: " "
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true"""
PICTURES = '''\
"""What the task asks and how it is marked, called by lmms-eval."""

from PIL import Image


def doc_to_visual(doc):
    return [Image.open(doc["image"]).convert("RGB")]


def process_results(doc, results):
    return {"exact_match": float(results[0].strip() == doc["answer"])}
'''


def write(folder: Path, questions: int, new_tokens: int = 1) -> None:
    """The tasks pocket_scenes, and pocket_scenes_choice of the same questions by likelihood."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    answers = sorted({held_out(i).question.answer for i in range(questions)})
    for i in range(questions):
        scene = held_out(i)
        file = folder.resolve() / f"{i}.png"
        scene.image.save(file)
        question = " ".join(parse(scene.question.text))
        row = {"index": i, "image": str(file), "question": question, "choices": answers}
        rows.append({**row, "answer": scene.question.answer})
    data = folder.resolve() / "questions.json"
    data.write_text("\n".join(map(json.dumps, rows)) + "\n")
    (folder / "pictures.py").write_text(PICTURES)
    for task, output_type, how in (
        (TASK, "generate_until", GENERATED.format(new_tokens=new_tokens)),
        (f"{TASK}_choice", "multiple_choice", RATED),
    ):
        text = YAML.format(task=task, questions=data, output_type=output_type, answers=how)
        (folder / f"{task}.yaml").write_text(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="writes a task for lmms-eval")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--questions", type=int, default=64, help="held-out scenes 0 to that")
    given = parser.parse_args()
    write(given.folder, given.questions)
