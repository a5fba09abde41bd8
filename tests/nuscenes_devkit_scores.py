"""`PYTHON nuscenes_devkit_scores.py TRUTH.json FOUND.json OUT.json` or `PYTHON ... ROOT VERSION SPLIT FOUND.json OUT.json`:
what does nuscenes-devkit itself say?

Run by a Python that has nuscenes-devkit, whose pins clash with this package's; nothing of this package is used. The first
form takes a boxes file with `ego_poses` for the truth and filters by class range and points; the second takes a release.
"""

import json
import sys
import tempfile
from pathlib import Path

from nuscenes import NuScenes
from nuscenes.eval.common.config import config_factory
from nuscenes.eval.common.data_classes import EvalBoxes
from nuscenes.eval.detection.algo import accumulate, calc_ap, calc_tp
from nuscenes.eval.detection.constants import TP_METRICS
from nuscenes.eval.detection.data_classes import DetectionBox, DetectionMetrics
from nuscenes.eval.detection.evaluate import DetectionEval

CONFIG = config_factory("detection_cvpr_2019")
UNMEASURED = {"traffic_cone": ("attr_err", "vel_err", "orient_err"), "barrier": ("attr_err", "vel_err")}


def read(path, poses):
    boxes = EvalBoxes()
    for token, own in json.loads(Path(path).read_text())["results"].items():
        x, y = poses[token]
        made = []
        for box in own:
            box["ego_translation"] = [box["translation"][0] - x, box["translation"][1] - y, 0.0]
            one = DetectionBox.deserialize(box)
            if one.ego_dist < CONFIG.class_range[one.detection_name] and one.num_pts != 0:
                made.append(one)
        boxes.add_boxes(token, made)
    return boxes


def evaluate_files(truth_path, found_path):
    poses = json.loads(Path(truth_path).read_text())["ego_poses"]
    truth, found = read(truth_path, poses), read(found_path, poses)
    metrics = DetectionMetrics(CONFIG)
    for name in CONFIG.class_names:
        for distance in CONFIG.dist_ths:
            data = accumulate(truth, found, name, CONFIG.dist_fcn_callable, distance)
            metrics.add_label_ap(name, distance, calc_ap(data, CONFIG.min_recall, CONFIG.min_precision))
            if distance == CONFIG.dist_th_tp:
                for error in TP_METRICS:
                    measured = error not in UNMEASURED.get(name, ())
                    value = calc_tp(data, CONFIG.min_recall, error) if measured else float("nan")
                    metrics.add_label_tp(name, error, value)
    return metrics


def evaluate_release(root, version, split, found_path):
    nusc = NuScenes(version=version, dataroot=root, verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        return DetectionEval(nusc, CONFIG, found_path, split, folder, verbose=False).evaluate()[0]


def main(*arguments):
    *inputs, out = arguments
    metrics = evaluate_files(*inputs) if len(inputs) == 2 else evaluate_release(*inputs)
    content = metrics.serialize()
    del content["eval_time"], content["cfg"]
    Path(out).write_text(json.dumps(content))


if __name__ == "__main__":
    main(*sys.argv[1:])
