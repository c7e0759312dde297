"""The referee: the properties of the conformance kit, checked on other people's losses as they are installed.

A *subject* is one loss of one library, behind a short adapter (``trl.py``, ``liger.py``, ``halos_repository.py``).
``properties.py`` checks each property on batches of growing size and reports the smallest one that shows a failure.
Nothing here imports halos, so that it runs where another library is installed and this project is not.
"""
