from phasegate.inference import Classifier as Classifier
from phasegate.inference import load as load

PARENT: int
