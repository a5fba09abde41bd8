"""KITTI's AP: perfect, empty, by hand, and against a slow loop written from the definition with shapely's overlaps."""

import numpy as np
import pytest

from simipu3d.metrics.files.kitti import read_folder
from simipu3d.metrics.kitti import LOOSE, STRICT, CameraObjects, kitti_ap, mean_over_classes, score_cut_offs

NAMES = ("Car", "Pedestrian", "Cyclist", "Van", "Person_sitting", "DontCare")


def objects(rows) -> CameraObjects:
    """Rows (name, truncation, occlusion, alpha, 2D box (4), h, w, l, x, y, z, rotation_y, score)."""
    values = np.array([row[1:] for row in rows], dtype=np.float64).reshape(-1, 15)
    columns = [0, 1, 2, slice(3, 7), slice(7, 10), slice(10, 13), 13, 14]
    return CameraObjects(tuple(row[0] for row in rows), *(values[:, column] for column in columns))


def random_frames(seed: int, num: int = 12):
    """Labels, and detections that are shifted and turned labels, doubles, other classes and chance."""
    rng = np.random.default_rng(seed)
    truth, found = [], []
    for _ in range(num):
        labels = []
        for name in rng.choice(NAMES, rng.integers(0, 9), p=[0.35, 0.2, 0.15, 0.1, 0.05, 0.15]):
            u, v, w, h = rng.uniform((0, 0, 15, 15), (500, 200, 120, 90))
            flags = [rng.choice([0, 0.2, 0.4, 0.6]), rng.integers(0, 4), rng.uniform(-3, 3)]
            place = [rng.uniform(-8, 8), 1.7, rng.uniform(5, 20), rng.uniform(-3, 3)]
            labels.append([name, *flags, u, v, u + w, v + h, *rng.uniform(1, 4, 3), *place, 0.0])
            if name == "DontCare":
                labels[-1][8:15] = [-1, -1, -1, -1000, -1000, -1000, -10]
        detections = []
        for label in labels:
            for _ in range(rng.choice([0, 1, 1, 2])):
                wide = np.array(label[1:], dtype=np.float64)
                wide[2] += rng.normal(0, 0.4)
                wide[3:7] += rng.normal(0, 3, 4)
                wide[7:10] = np.abs(wide[7:10]) * rng.uniform(0.9, 1.1, 3)
                wide[10:13] += rng.normal(0, 0.12, 3)
                wide[13] += rng.normal(0, 0.1)
                wide[14] = rng.integers(0, 40) / 40
                name = rng.choice(NAMES[:3]) if label[0] == "DontCare" or rng.random() < 0.1 else label[0]
                detections.append([name, *wide])
        truth.append(objects(labels))
        found.append(objects(detections))
    return truth, found


def slow_overlap(metric, one, i, other, j):
    """Intersection and the two contents of detection i and label j."""
    if metric == "2d":
        from shapely.geometry import box

        a, b = box(*one.image_box[i]), box(*other.image_box[j])
        return a.intersection(b).area, a.area, b.area
    from shapely.geometry import Polygon

    shapes, spans = [], []
    for side, row in ((one, i), (other, j)):
        h, w, length = side.size[row]
        if min(h, w, length) <= 0:
            return 0.0, 0.0, 0.0
        x, y, z = side.bottom_center[row]
        c, s = np.cos(side.rotation_y[row]), np.sin(side.rotation_y[row])
        local = [(length / 2, w / 2), (length / 2, -w / 2), (-length / 2, -w / 2), (-length / 2, w / 2)]
        shapes.append(Polygon([(x + c * along + s * across, z - s * along + c * across) for along, across in local]))
        spans.append((y - h, y))
    common = shapes[0].intersection(shapes[1]).area
    if metric == "bev":
        return common, shapes[0].area, shapes[1].area
    rise = max(0.0, min(spans[0][1], spans[1][1]) - max(spans[0][0], spans[1][0]))
    return common * rise, *(shape.area * (span[1] - span[0]) for shape, span in zip(shapes, spans, strict=True))


def slow_ap(truth, found, class_name, metric, level, min_overlap):
    """R11, R40 and the same of orientation, straight from the definition."""
    height, occlusion, truncation = ((40, 0, 0.15), (25, 1, 0.3), (25, 2, 0.5))[level]
    near = {"Car": "Van", "Pedestrian": "Person_sitting"}.get(class_name)
    frames, total = [], 0
    for labels, detections in zip(truth, found, strict=True):
        kinds = []
        for k, name in enumerate(labels.names):
            fits = labels.occlusion[k] <= occlusion and labels.truncation[k] <= truncation
            fits = fits and labels.image_box[k, 3] - labels.image_box[k, 1] > height
            kinds.append("count" if name == class_name and fits else "ignore" if name in (class_name, near) else None)
        total += kinds.count("count")
        low = [box[3] - box[1] < height for box in detections.image_box]
        own = [
            "ignore" if small else "count" if name == class_name else None
            for small, name in zip(low, detections.names, strict=True)
        ]
        iou, covered = {}, set()
        for d in range(len(own)):
            for t in range(len(kinds)):
                common, a, b = slow_overlap(metric, detections, d, labels, t)
                iou[d, t] = common / (a + b - common) if common > 0 else 0.0
                if labels.names[t] == "DontCare" and common > 0 and common / a > min_overlap:
                    covered.add(d)
        frames.append((kinds, own, iou, covered if metric == "2d" else set(), labels, detections))
    if total == 0:
        return [np.nan] * 4, 0

    def match(frame, cut_off):
        kinds, own, iou, covered, _, detections = frame
        free, pairs = {d for d, kind in enumerate(own) if kind}, []
        if cut_off is not None:
            free = {d for d in free if detections.score[d] >= cut_off}
        considered = set(free)
        for t, kind in enumerate(kinds):
            able = sorted(d for d in free if kind and iou[d, t] > min_overlap)
            if not able:
                continue
            if cut_off is None:
                chosen = max(able, key=lambda d: detections.score[d])
            else:
                counted = [d for d in able if own[d] == "count"]
                chosen = max(counted, key=lambda d: iou[d, t]) if counted else able[0]
            free.remove(chosen)
            if kind == "count" and own[chosen] == "count":
                pairs.append((t, chosen))
        wrong = {d for d in free & considered if own[d] == "count"} - covered
        return pairs, len(wrong)

    scores = [frame[5].score[d] for frame in frames for _, d in match(frame, None)[0]]
    curve, similarity = np.zeros(41), np.zeros(41)
    for place, cut_off in enumerate(score_cut_offs(np.array(scores), total)):
        hits = wrong = similar = 0
        for frame in frames:
            pairs, failed = match(frame, cut_off)
            hits, wrong = hits + len(pairs), wrong + failed
            similar += sum((1 + np.cos(frame[4].alpha[t] - frame[5].alpha[d])) / 2 for t, d in pairs)
        if hits + wrong:
            curve[place], similarity[place] = hits / (hits + wrong), similar / (hits + wrong)
    result = []
    for values in (curve, similarity):
        best = [values[place:].max() for place in range(41)]
        result += [100 * sum(best[0:41:4]) / 11, 100 * sum(best[1:]) / 40]
    return result, total


@pytest.mark.parametrize("seed", range(2))
def test_agrees_with_the_slow_loop(seed):
    pytest.importorskip("shapely")
    truth, found = random_frames(seed)
    for thresholds in (STRICT, LOOSE):
        cells = {(c.class_name, c.metric, c.difficulty): c for c in kitti_ap(truth, found, thresholds)}
        assert len(cells) == 36
        for name, minimum in thresholds.items():
            for place, metric in enumerate(("2d", "bev", "3d")):
                for level, difficulty in enumerate(("easy", "moderate", "hard")):
                    expected, total = slow_ap(truth, found, name, metric, level, minimum[place])
                    cell = cells[name, metric, difficulty]
                    assert cell.num_objects == total
                    assert (cell.r11, cell.r40) == pytest.approx(expected[:2], abs=1e-6, nan_ok=True)
                    if metric == "2d":
                        aos = cells[name, "aos", difficulty]
                        assert (aos.r11, aos.r40) == pytest.approx(expected[2:], abs=1e-6, nan_ok=True)
    assert cells["Car", "3d", "hard"].r40 > 1
    assert cells["Car", "2d", "hard"].r40 < 97


@pytest.mark.parametrize("shift", [0.0, 0.05])
def test_truth_as_prediction_is_100_on_real_labels(samples, shift):
    """Enough frames for 41 recall samples of every class: each file is scored several times over. The evaluation does not
    depend on the order of the frames; a common shift along the road loses only the boxes whose overlap it breaks."""
    frames = [*read_folder(samples / "kitti_labels" / "training" / "label_2", needs_score=False).values()] * 8
    found = []
    for frame in frames:
        kept = [k for k, name in enumerate(frame.names) if name != "DontCare"]
        columns = {
            name: getattr(frame, name)[kept]
            for name in ("truncation", "occlusion", "alpha", "image_box", "size", "bottom_center", "rotation_y")
        }
        columns["bottom_center"] = columns["bottom_center"] + [0, 0, shift]
        found.append(
            CameraObjects(tuple(frame.names[k] for k in kept), **columns, score=np.linspace(0.2, 1, len(kept)))
        )
    cells = kitti_ap(frames, found)
    for cell in cells:
        assert cell.num_objects > 41
        if shift == 0 or cell.metric in ("2d", "aos"):
            assert (cell.r11, cell.r40) == pytest.approx((100, 100)), cell
    overall = mean_over_classes(cells, "3d", "moderate")
    assert overall == pytest.approx((100, 100)) if shift == 0 else 90 < overall[1] <= 100
    back = kitti_ap(frames[::-1], found[::-1])
    assert [cell.r40 for cell in back] == pytest.approx([cell.r40 for cell in cells])


CAR = ["Car", 0, 0, 0.0, 100, 100, 200, 160, 1.5, 1.6, 4.0, 0.0, 1.7, 20.0, 0.0, 0.0]


def changed(row, score, **changes):
    row = [*row[:-1], score]
    for place, value in changes.items():
        row[int(place[1:])] = value
    return row


def test_by_hand():
    """Two cars; the surer detection is right, the next is wrong, the last is right: precision 1 at recall 1/2, then 2/3.
    Cut-offs are two, so R11 sees the first of them at recall 0 only and R40 the second at 1/40."""
    second = changed(CAR, 0.0, _11=9.0, _4=400, _6=500)
    truth = [objects([CAR, second])]
    found = [objects([changed(CAR, 0.9), changed(CAR, 0.8, _11=-9.0, _4=600, _6=700), changed(second, 0.7)])]
    cells = {(c.metric, c.difficulty): c for c in kitti_ap(truth, found) if c.class_name == "Car"}
    for metric in ("2d", "bev", "3d", "aos"):
        cell = cells[metric, "easy"]
        assert (cell.r11, cell.r40, cell.num_objects) == pytest.approx((100 / 11, 100 * (2 / 3) / 40, 2))
    turned = [objects([changed(CAR, 0.9, _3=np.pi)])]
    cells = {(c.metric, c.difficulty): c for c in kitti_ap([objects([CAR])], turned) if c.class_name == "Car"}
    assert cells["2d", "easy"].r11 == pytest.approx(100 / 11)
    assert cells["aos", "easy"].r11 == pytest.approx(0)
    blind = [objects([changed(CAR, 0.9, _3=-10.0)])]
    cells = {(c.metric, c.difficulty): c for c in kitti_ap([objects([CAR])], blind) if c.class_name == "Car"}
    assert np.isnan(cells["aos", "easy"].r11)


def first_precision(truth, found, metric="2d", difficulty="easy"):
    """Precision at the first cut-off, from R11, which sees one of eleven samples here."""
    cells = kitti_ap([objects(truth)], [objects(found)])
    return next(c for c in cells if (c.class_name, c.metric, c.difficulty) == ("Car", metric, difficulty)).r11 * 11


def test_what_is_ignored():
    elsewhere = {"_4": 400, "_6": 500, "_11": 9.0}
    right, other = changed(CAR, 0.5), changed(CAR, 0.9, **elsewhere)
    assert first_precision([CAR], [right, other]) == pytest.approx(50)
    van = ["Van", *changed(CAR, 0.0, **elsewhere)[1:]]
    assert first_precision([CAR, van], [right, other]) == pytest.approx(100)
    truck = ["Truck", *changed(CAR, 0.0, **elsewhere)[1:]]
    assert first_precision([CAR, truck], [right, other]) == pytest.approx(50)
    hidden = changed(CAR, 0.0, _2=1, **elsewhere)
    assert first_precision([CAR, hidden], [right, other]) == pytest.approx(100)
    region = ["DontCare", -1, -1, -10, 380, 50, 520, 200, -1, -1, -1, -1000, -1000, -1000, -10, 0.0]
    assert first_precision([CAR, region], [right, other]) == pytest.approx(100)
    assert first_precision([CAR, region], [right, other], metric="bev") == pytest.approx(50)
    assert first_precision([CAR], [right, changed(other, 0.9, _7=139)]) == pytest.approx(100), "39 pixels high"
    exactly = changed(CAR, 0.5, _4=100, _6=170)
    assert first_precision([CAR], [exactly]) == 0, "an overlap of exactly 0.7 is no match"
    assert np.isnan(first_precision([changed(CAR, 0.0, _7=140)], [right])), "truth of exactly 40 pixels is not easy"


def test_empty_and_wrong_input():
    nothing = objects([])
    assert all(np.isnan(cell.r40) for cell in kitti_ap([nothing], [nothing]))
    assert all(np.isnan(cell.r40) for cell in kitti_ap([], []))
    cells = kitti_ap([objects([CAR])], [nothing])
    assert {cell.r40 for cell in cells if cell.class_name == "Car"} == {0.0}
    assert np.isnan(mean_over_classes(kitti_ap([nothing], [nothing]), "3d", "easy")).all()
    with pytest.raises(ValueError, match="1 frames of truth and 0"):
        kitti_ap([nothing], [])
    with pytest.raises(ValueError, match="bottom_center"):
        kitti_ap([objects([CAR])], [objects([changed(CAR, 0.5, _11=np.nan)])])
    with pytest.raises(ValueError, match="score"):
        kitti_ap([objects([CAR])], [objects([changed(CAR, np.nan)])])
